"""Examine whether the installed libraries work together, and name the command that fixes each.

Most combinations that a resolver accepts do not run, because MMDetection and MMSegmentation are older than current
torch, NumPy and setuptools. Versions alone do not tell (MMCV may lack its compiled operators), so that every entry of
:data:`PARTS` is imported. Importing this module needs none of them.
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
"""Versions of torch: the first that runs, and the first whose headers need C++20, while MMCV 2.1 is C++17."""

TORCH = 'pip install "torch>={}.{},<{}.{}"'.format(*LOWEST, *BEYOND)

SETUPTOOLS = 'pip install "setuptools<81"'
"""MMEngine imports pkg_resources, which setuptools 81 removed."""

MMCV = (
    'pip install "setuptools<81" wheel ninja psutil && MMCV_WITH_OPS=1 '
    "pip install --no-build-isolation --no-cache-dir --no-deps --force-reinstall mmcv==2.1.0"
)
"""With build isolation, MMCV does not find torch and silently omits its operators. 10 to 15 minutes on 2 cores."""

MMDET = "pip install mmdet==3.3.0"
MMSEG = "pip install mmsegmentation==1.2.2 ftfy regex"
OPENCV = (
    "pip uninstall --yes opencv-python opencv-python-headless && pip install --force-reinstall opencv-python-headless"
)


@dataclass(frozen=True)
class Finding:
    """State of one library."""

    name: str
    """Import name."""

    distribution: str
    """Name and version of the installed distribution, empty if there is none."""

    state: str
    """``ok``, ``absent`` (not installed and not needed) or ``broken``."""

    reason: str = ""
    """Why it is broken, in one line."""

    command: str = ""
    """Shell command that fixes it, in one line."""


@dataclass(frozen=True)
class Part:
    """One library to examine."""

    name: str
    """Import name."""

    command: str
    """Shell command that installs or fixes it."""

    needed: bool = False
    """Report it as broken, not as absent, if it is not installed."""

    attempt: Callable[[], None] | None = None
    """Test after the import, which raises if the library does not work."""


def examine() -> list[Finding]:
    """Examine all of :data:`PARTS`, dependencies first."""
    return [_examine(part) for part in PARTS]


def require(library: str) -> None:
    """Import ``mmdet`` or ``mmseg`` and its dependencies.

    Raises:
        ImportError: in one line, with the command that fixes it.
    """
    for finding in (_examine(part) for part in PARTS if part.name in ("mmengine", "mmcv", library)):
        if finding.state != "ok":
            raise ImportError(
                f"{finding.name} {finding.distribution.partition(' ')[2]} cannot be used: {finding.reason}; "
                f"to fix it: {finding.command}".replace("  ", " ")
            )


def usable(findings: list[Finding]) -> bool:
    """Return true if nothing is broken and one of MMDetection and MMSegmentation works."""
    ok = {finding.name for finding in findings if finding.state == "ok"}
    return bool(ok & {"mmdet", "mmseg"}) and all(finding.state != "broken" for finding in findings)


def _examine(part: Part) -> Finding:
    distribution = _distribution(part.name)
    try:
        with _quiet():
            importlib.import_module(part.name)
            if part.attempt is not None:
                part.attempt()
    except Exception as error:  # a broken installation may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == part.name and not distribution:
            state = "broken" if part.needed else "absent"
            return Finding(part.name, "", state, "it is not installed", part.command)
        reason = " ".join(str(error).split()) or type(error).__name__
        return Finding(part.name, distribution, "broken", reason, _command(error, part.command))
    return Finding(part.name, distribution, "ok")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence imports: libraries warn about each other's deprecations, and DeepSpeed about a missing GPU.

    DeepSpeed logs to the stdout of its first import, which must not be that of a command that prints JSON.
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
    """Return the installed distributions of a module, forks included, with their versions."""
    owners = sorted(set(importlib.metadata.packages_distributions().get(name, [])))
    return ", ".join(f"{owner} {importlib.metadata.version(owner)}" for owner in owners)


def _command(error: Exception, command: str) -> str:
    """Return the command that fixes the cause, which may be a dependency."""
    text = str(error)
    if "pkg_resources" in text:
        return SETUPTOOLS
    if "libGL" in text or "cv2" in text:
        return OPENCV
    if "MMCV" in text or "mmcv" in text:
        return MMCV
    return command


def _torch() -> None:
    """Raise ImportError for a torch that MMCV 2.1 cannot be compiled with."""
    version = importlib.import_module("torch").__version__
    major, minor = version.split(".")[:2]
    if not LOWEST <= (int(major), int(minor)) < BEYOND:
        low, high = (".".join(map(str, bound)) for bound in (LOWEST, BEYOND))
        raise ImportError(f"torch must be from {low} to below {high}, got {version}")


def _mmcv_operators() -> None:
    """Raise ImportError for compiled operators that are missing or for another torch or device."""
    try:
        ops = importlib.import_module("mmcv.ops")
    except ImportError as error:
        raise ImportError(f"its compiled operators do not load ({error})") from error
    import torch

    if torch.cuda.is_available() and "not available" in str(ops.get_compiling_cuda_version()).lower():
        raise ImportError("its operators were compiled without CUDA, and torch uses a GPU")


def _mmcv_version() -> None:
    """Raise ImportError for an MMCV that MMDetection 3.3 and MMSegmentation 1.2 refuse."""
    from packaging.version import Version

    mmcv = importlib.import_module("mmcv")
    official = {"mmdet", "mmsegmentation"} & _installed()
    if official and not Version("2.0.0rc4") <= Version(mmcv.__version__) < Version("2.2.0"):
        raise ImportError(f"mmcv must be from 2.0.0rc4 to below 2.2.0 for mmdet and mmseg, got {mmcv.__version__}")


def _mmcv() -> None:
    _mmcv_version()
    _mmcv_operators()


def _installed() -> set[str]:
    return {found.metadata["Name"] for found in importlib.metadata.distributions()}


def _module(name: str) -> Callable[[], None]:
    """Return an attempt that imports a module, which imports most of its library."""

    def attempt() -> None:
        importlib.import_module(name)

    return attempt


PARTS = [
    Part("torch", TORCH, needed=True, attempt=_torch),
    Part(
        "torchvision",
        # from one index, because builds for CPU and CUDA do not mix
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
"""Libraries to examine, dependencies first."""
