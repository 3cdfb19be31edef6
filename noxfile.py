"""Everything that checks this repository: ``nox`` alone is the test command, ``nox --list`` shows all sessions.

Every session has an environment of its own, made by uv from ``constraints.txt``; uv keeps the wheels, so that an
environment costs seconds after the first time.
"""

import os
import shutil
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "typing", "tests", "faults(short)", "browser", "wheels", "demo"]
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"

PACKAGES = ["core", "train", "dense", "analysis"]
GROUPS = {"dense": ("test", "photographs")}
"""Dependency groups of a package's tests, where they are more than ``test``."""

FORKS = ["onedl-mmengine==0.10.12", "onedl-mmcv==2.3.6", "onedl-mmdetection==3.5.1", "onedl-mmsegmentation==1.4.2"]
"""MMDetection and MMSegmentation as the community carries them on, under the same import names."""

BENCHMARKS = {
    "core": ["-e", "packages/hatnet-core", "-e", "packages/hatnet-analysis[timm]"],
    "training": ["--group=photographs", "-e", "packages/hatnet-core", "-e", "packages/hatnet-train[all]"],
    "dense": ["--group=photographs", "-e", "packages/hatnet-core", "-e", "packages/hatnet-dense[all]"],
    "analysis": ["-e", "packages/hatnet-core", "-e", "packages/hatnet-dense", "-e", "packages/hatnet-analysis[all]"],
}
"""What each benchmark measures with."""

BROWSER = "packages/hatnet-analysis/tests/browser"
"""Tests that click in a browser; in a session of their own."""

FAULTS = "packages/hatnet-train/tests/faults"
"""Tests that break things; in a session of their own."""

OTHER_INTERPRETERS = ["3.10", "3.12", "3.13"]
"""What hatnet-core declares beyond 3.11, which all other sessions run on."""

FORWARD_PASS = """
import importlib.metadata, sys
import torch
from hatnet_core import create_model

required = [r for r in importlib.metadata.requires("hatnet-core") if "extra ==" not in r]
assert required == ["torch>=2.10"], required
model = create_model("hatnet_tiny", num_classes=10).eval()
with torch.inference_mode():
    assert model(torch.zeros(1, 3, 64, 96)).shape == (1, 10)
assert "site-packages" in sys.modules["hatnet_core"].__file__
print("hatnet-core alone:", sum(p.numel() for p in model.parameters()), "parameters, forward pass done")
"""


def install(session: nox.Session, *packages: str, groups: tuple[str, ...] = ()) -> None:
    """Install packages of this workspace in place, with all their extras, and dependency groups of the root."""
    wanted = [f"--group={group}" for group in groups]
    for package in packages:
        wanted += ["-e", f"packages/hatnet-{package}[all]"]
    # what they need of each other is what lies beside them, not a release
    needed = {"core", "dense"} if "analysis" in packages else {"core"}
    for package in sorted(needed - set(packages)):
        wanted += ["-e", f"packages/hatnet-{package}"]
    session.install("-c", "constraints.txt", *wanted)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, import order, docstrings, spelling."""
    session.install("-c", "constraints.txt", "--group=lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("codespell")


@nox.session
def typing(session: nox.Session) -> None:
    """Strict type checking of every package."""
    install(session, *PACKAGES, groups=("typing",))
    session.run("mypy", *(f"packages/hatnet-{package}/src" for package in PACKAGES))


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """Tests of one package, such as "tests(core)"; arguments after -- go to pytest."""
    install(session, package, groups=GROUPS.get(package, ("test",)))
    folder = f"packages/hatnet-{package}/tests"
    if package == "train":  # its tests start processes of their own, and its examples DeepSpeed
        session.run("pytest", folder, f"--ignore={FAULTS}", *session.posargs)
        return
    examples = [f"packages/hatnet-{package}/src", f"packages/hatnet-{package}/README.md"]
    options = [
        "--doctest-modules",
        "--doctest-ignore-import-errors",
        "--doctest-glob=README.md",
        "--numprocesses=2",
        "--dist=loadfile",
    ]
    options.append(f"--ignore={BROWSER}")
    session.run("pytest", folder, *examples, *options, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session(python=OTHER_INTERPRETERS)
def interpreters(session: nox.Session) -> None:
    """Tests of hatnet-core on the other interpreters it declares, such as "interpreters-3.12"; skips absent ones."""
    install(session, "core", groups=("test",))
    session.run("pytest", "packages/hatnet-core/tests", *session.posargs)


@nox.session
def lowest(session: nox.Session) -> None:
    """Tests of hatnet-core with the lowest versions of torch and all else that it declares."""
    session.install("--resolution=lowest-direct", "-e", "packages/hatnet-core[all]", "--group=test")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    session.run("pytest", "packages/hatnet-core/tests", *session.posargs)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def slow(session: nox.Session, package: str) -> None:
    """The tests of one package that take minutes, such as "slow(core)"."""
    install(session, package, groups=GROUPS.get(package, ("test",)))
    paths = [f"packages/hatnet-{package}/tests", f"--ignore={FAULTS}", f"--ignore={BROWSER}"]
    session.run("pytest", "-m", "slow", *paths, *session.posargs, success_codes=[0, 5])


@nox.session
@nox.parametrize("form", ["short", "long"], ids=["short", "long"])
def faults(session: nox.Session, form: str) -> None:
    """Training runs that are killed, whose disk is full, whose files are damaged; "faults(long)" tries all of it."""
    install(session, "train", groups=("test",))
    which = {"short": "not slow", "long": "slow or not slow"}[form]
    session.run("pytest", "-m", which, FAULTS, *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The report of hatnet-analysis, opened and clicked in headless Chromium; skipped where there is none."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        session.skip("no browser: expected chromium on the PATH, or its path in CHROMIUM (apt-get install chromium)")
    install(session, "analysis", groups=("test", "browser"))
    session.run("pytest", BROWSER, *session.posargs, env={"CHROMIUM": found})


@nox.session
def forks(session: nox.Session) -> None:
    """Tests of hatnet-dense on the community's forks of MMDetection and MMSegmentation."""
    groups = [f"--group={group}" for group in GROUPS["dense"]]
    here = ["-e", "packages/hatnet-core", "-e", "packages/hatnet-dense[deepspeed]"]
    session.install("-c", "constraints.txt", *FORKS, "ftfy", "regex", *groups, *here)
    session.run("hatnet-dense", "doctor")
    session.run("pytest", "packages/hatnet-dense/tests", *session.posargs)


@nox.session
def dense_training(session: nox.Session) -> None:
    """Train Mask R-CNN, RetinaNet and Semantic FPN from scratch on drawn shapes, to figures that have to be met."""
    install(session, "dense", groups=("photographs",))
    session.run("python", "benchmarks/dense.py", "shapes", *(session.posargs or ["--out", "docs/benchmarks"]))


@nox.session
def wheels(session: nox.Session) -> None:
    """Build every wheel and sdist; install the core wheel alone in an empty environment and use it."""
    dist = Path(session.create_tmp()) / "dist"
    for package in PACKAGES:
        folder = dist / package
        session.run_install(
            "uv", "build", "--quiet", "--clear", "--out-dir", str(folder), f"packages/hatnet-{package}"
        )
        (built,) = folder.glob("*.whl")
        names = {name.partition("/")[2] for name in zipfile.ZipFile(built).namelist()}
        for wanted in {"py.typed", "licenses/LICENSE", "METADATA"} - names:
            session.error(f"{built.name} lacks {wanted}")
        session.log("built " + ", ".join(sorted(f.name for f in folder.glob("hatnet*"))))
    (wheel,) = (dist / "core").glob("*.whl")
    session.install("-c", "constraints.txt", f"hatnet-core @ {wheel.resolve().as_uri()}")
    # torch without NumPy, which it does not require, says so in a warning of its own
    session.run("python", "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-c", FORWARD_PASS)


@nox.session
def demo(session: nox.Session) -> None:
    """Train on scikit-learn's digits under DeepSpeed, predict held-out images, show what came out."""
    install(session, "train")
    session.run("python", "examples/digits_demo.py", *session.posargs)


@nox.session
@nox.parametrize("subject", list(BENCHMARKS), ids=list(BENCHMARKS))
def bench(session: nox.Session, subject: str) -> None:
    """Measure "core" (speed, memory), "training" (loader, engine), "dense" (shapes, detectors), "analysis" (paper)."""
    session.install("-c", "constraints.txt", *BENCHMARKS[subject])
    session.run("python", f"benchmarks/{subject}.py", *(session.posargs or ["--out", "docs/benchmarks"]))


@nox.session
def bench_guard(session: nox.Session) -> None:
    """Measure the ratios of "bench(core)" again; fails where one is 15 % behind the latest that is recorded."""
    session.install("-c", "constraints.txt", *BENCHMARKS["core"])
    recorded = max(Path("docs/benchmarks").glob("*-core.json"), default=None)
    if recorded is None:
        session.error("docs/benchmarks has no report to compare with: expected one of nox -s 'bench(core)'")
    out = session.create_tmp()
    chosen = session.posargs or ["inference", "variants", "training"]
    session.run("python", "benchmarks/core.py", *chosen, "--out", out, "--against", str(recorded))
