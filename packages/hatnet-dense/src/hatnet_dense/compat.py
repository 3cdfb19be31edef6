"""What is installed of MMDetection and MMSegmentation, whether it fits together, and the command that fixes it.

These libraries move slowly while torch, NumPy and setuptools move on; most combinations that a resolver accepts do
not run. Every entry of :data:`PARTS` is tried by importing it, since the versions alone do not tell: MMCV may be there
without its compiled operators. Importing this module needs none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LOWEST, BEYOND = (2, 10), (2, 14)
"""Versions of torch: the first that runs, and the first whose headers want C++20; MMCV 2.1 is C++17."""

TORCH = 'pip install "torch>={}.{},<{}.{}"'.format(*LOWEST, *BEYOND)

SETUPTOOLS = 'pip install "setuptools<81"'
"""MMEngine imports pkg_resources, which setuptools dropped with version 81."""

MMCV = (
    'pip install "setuptools<81" wheel ninja psutil && MMCV_WITH_OPS=1 '
    "pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall mmcv==2.1.0"
)
"""In build isolation MMCV sees no torch, leaves its operators out and says nothing. 10 to 15 minutes on 2 cores."""

MMDET = "pip install mmdet==3.3.0"
MMSEG = "pip install mmsegmentation==1.2.2 ftfy regex"
OPENCV = (
    "pip uninstall --yes opencv-python opencv-python-headless && pip install --force-reinstall opencv-python-headless"
)


@dataclass(frozen=True)
class Finding:
    """What :func:`examine` found out about one part.

    Attributes:
        name: what is imported.
        distribution: the name and version under which it was installed, empty if it was not.
        state: ``ok``, ``absent`` (not installed, and nothing else asks for it) or ``broken``.
        reason: why it is broken, one line.
        command: what fixes it, one line for a shell.
    """

    name: str
    distribution: str
    state: str
    reason: str = ""
    command: str = ""


@dataclass(frozen=True)
class Part:
    """One library: what to import to see that it works, and the command that installs it as it should be.

    Attributes:
        name: its import name.
        attempt: raises if it does not work; by default its import.
        needed: whether its absence is a defect.
        command: what installs or fixes it.
    """

    name: str
    command: str
    needed: bool = False
    attempt: Callable[[], None] | None = None


def examine() -> list[Finding]:
    """Try all of :data:`PARTS`, in the order in which they build on each other."""
    return [_examine(part) for part in PARTS]


def require(library: str) -> None:
    """Import ``mmdet`` or ``mmseg`` with what it stands on.

    Raises:
        ImportError: in one line, with the command that fixes it.
    """
    for finding in (_examine(part) for part in PARTS if part.name in ("mmengine", "mmcv", library)):
        if finding.state != "ok":
            raise ImportError(
                f"{finding.name} {finding.distribution.partition(' ')[2]} cannot be used: {finding.reason}; "
                f"expected what this installs: {finding.command}".replace("  ", " ")
            )


def usable(findings: list[Finding]) -> bool:
    """Whether nothing is broken, and one of the two libraries is there."""
    ok = {finding.name for finding in findings if finding.state == "ok"}
    return bool(ok & {"mmdet", "mmseg"}) and all(finding.state != "broken" for finding in findings)


def _examine(part: Part) -> Finding:
    distribution = _distribution(part.name)
    try:
        with _quiet():
            importlib.import_module(part.name)
            if part.attempt is not None:
                part.attempt()
    except Exception as error:  # a broken installation raises whatever it likes
        if isinstance(error, ModuleNotFoundError) and error.name == part.name and not distribution:
            state = "broken" if part.needed else "absent"
            return Finding(part.name, "", state, "it is not installed", part.command)
        reason = " ".join(str(error).split()) or type(error).__name__
        return Finding(part.name, distribution, "broken", reason, _command(error, part.command))
    return Finding(part.name, distribution, "ok")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Imports without a word: many libraries warn of each other's deprecations, and DeepSpeed of a missing GPU.

    DeepSpeed keeps logging to what stdout is when it is first imported: not into the JSON of the command.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _distribution(name: str) -> str:
    """The installed packages, forks included, that hold the module ``name``, with their versions."""
    owners = sorted(set(importlib.metadata.packages_distributions().get(name, [])))
    return ", ".join(f"{owner} {importlib.metadata.version(owner)}" for owner in owners)


def _command(error: Exception, command: str) -> str:
    """The cause may lie one library below."""
    text = str(error)
    if "pkg_resources" in text:
        return SETUPTOOLS
    if "libGL" in text or "cv2" in text:
        return OPENCV
    if "MMCV" in text or "mmcv" in text:
        return MMCV
    return command


def _torch() -> None:
    """ImportError unless MMCV 2.1 can be compiled with this torch, as the requirements of this package say."""
    version = importlib.import_module("torch").__version__
    major, minor = version.split(".")[:2]
    if not LOWEST <= (int(major), int(minor)) < BEYOND:
        low, high = (".".join(map(str, bound)) for bound in (LOWEST, BEYOND))
        raise ImportError(f"torch must be from {low} to below {high}, got {version}")


def _mmcv_operators() -> None:
    """ImportError unless the compiled operators are there and are those of this torch and device."""
    try:
        importlib.import_module("mmcv._ext")
    except ImportError as error:
        raise ImportError(f"its compiled operators do not load ({error})") from error
    import torch

    ops = importlib.import_module("mmcv.ops")
    if torch.cuda.is_available() and "not available" in str(ops.get_compiling_cuda_version()).lower():
        raise ImportError("its operators were compiled without CUDA, and torch uses a GPU")


def _mmcv_version() -> None:
    """ImportError if MMDetection 3.3 or MMSegmentation 1.2 would refuse this MMCV."""
    from packaging.version import Version

    mmcv = importlib.import_module("mmcv")
    official = {"mmdet", "mmsegmentation"} & _installed()
    if official and not Version("2.0.0rc4") <= Version(mmcv.__version__) < Version("2.2.0"):
        raise ImportError(f"mmcv {mmcv.__version__} is not from 2.0.0rc4 to below 2.2.0, as mmdet and mmseg demand")


def _mmcv() -> None:
    _mmcv_version()
    _mmcv_operators()


def _installed() -> set[str]:
    return {found.metadata["Name"] for found in importlib.metadata.distributions()}


def _module(name: str) -> Callable[[], None]:
    """The import of a module inside, which draws in nearly all of its library."""

    def attempt() -> None:
        importlib.import_module(name)

    return attempt


PARTS = [
    Part("torch", TORCH, needed=True, attempt=_torch),
    Part(
        "torchvision",
        # both from one index: CPU-only and CUDA do not mix
        f'{TORCH} torchvision "setuptools<81" --force-reinstall',
        attempt=_module("torchvision.ops"),
    ),
    Part("pkg_resources", SETUPTOOLS, needed=True),
    Part("cv2", OPENCV, needed=True),
    Part("mmengine", "pip install mmengine==0.10.7", needed=True, attempt=_module("mmengine.runner")),
    Part("mmcv", MMCV, needed=True, attempt=_mmcv),
    Part("mmdet", MMDET, attempt=_module("mmdet.apis")),
    Part("mmseg", MMSEG, attempt=_module("mmseg.apis")),
    Part("deepspeed", 'pip install "hatnet-dense[deepspeed]"'),
]
"""In the order in which they build on each other."""
