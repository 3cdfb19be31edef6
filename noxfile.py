"""Everything that checks this repository: ``nox`` alone is the test command, ``nox --list`` shows all sessions.

Every session has an environment of its own, made by uv from ``constraints.txt``; uv keeps the wheels, so that an
environment costs seconds after the first time.
"""

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv"
nox.options.sessions = ["lint", "typing", "tools", "changes", "tests", "faults(short)", "browser", "wheels", "demo"]
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"

PACKAGES = ["core", "train", "dense", "analysis"]
GROUPS = {"core": ("test", "ecosystem", "deploy"), "dense": ("test", "photographs")}
"""Dependency groups of a package's tests, where they are more than ``test``."""

FORKS = ["onedl-mmengine==0.10.12", "onedl-mmcv==2.3.6", "onedl-mmdetection==3.5.1", "onedl-mmsegmentation==1.4.2"]
"""MMDetection and MMSegmentation as the community carries them on, under the same import names."""

BENCHMARKS = {
    "core": ["openvino", "-e", "packages/hatnet-core[onnx]", "-e", "packages/hatnet-analysis[timm]"],
    "training": ["--group=photographs", "-e", "packages/hatnet-core", "-e", "packages/hatnet-train[all]"],
    "dense": ["--group=photographs", "-e", "packages/hatnet-core", "-e", "packages/hatnet-dense[all]"],
    "analysis": ["-e", "packages/hatnet-core", "-e", "packages/hatnet-dense", "-e", "packages/hatnet-analysis[all]"],
}
"""What each benchmark measures with."""

COMMANDS = {
    "core": ["hatnet-export"],
    "train": ["hatnet-train", "hatnet-eval", "hatnet-predict", "hatnet-shards"],
    "dense": ["hatnet-dense"],
    "analysis": ["hatnet-analysis"],
}

BROWSER = {package: f"packages/hatnet-{package}/tests/browser" for package in ("train", "analysis")}
"""Tests that click in a browser, by package; in a session of their own."""

CONFIGS = "packages/hatnet-dense/src/hatnet_dense/configs"
"""MMDetection's kind of configs, which MMEngine reads and nothing else can import."""

FAULTS = "packages/hatnet-train/tests/faults"
"""Tests that break things; in a session of their own."""

PROSE = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "noxfile.py",
    "benchmarks",
    "docs",
    "examples",
    "packages",
    "testing",
]
"""Files and folders whose English is checked."""

SCHEMAS = {
    "github-workflows": ".github/workflows/*.yml",
    "github-issue-forms": ".github/ISSUE_TEMPLATE/[!c]*.yml",
    "github-issue-config": ".github/ISSUE_TEMPLATE/config.yml",
    "dependabot": ".github/dependabot.yml",
    "citation-file-format": "CITATION.cff",
}
"""The schema that files are checked against which nothing here reads: the host of the repository does."""

TWO_AT_A_TIME = ["--numprocesses=2", "--dist=loadfile"]
"""Two files of tests at a time, since module fixtures are costly."""

NOT_SLOW = ["-m", "not slow"]
EVERY = ["-m", "slow or not slow"]
"""Tests that pytest selects here; alone, it also skips those marked long."""

NIGHTLY = [
    *(f"coverage({package})" for package in PACKAGES),
    *(f"slow({package})" for package in PACKAGES),
    *(f"interpreters-{version}" for version in ("3.10", "3.12", "3.13")),
    *("lowest", "faults(long)", "dense_training", "forks", "docs", "gpu_dry"),
]

OTHER_INTERPRETERS = ["3.10", "3.12", "3.13"]
"""What hatnet-core declares beyond 3.11, which all other sessions run on."""

COVERED = {"core": 95, "train": 90, "dense": 90, "analysis": 90}
"""Per cent of each package's lines that its tests have to run."""


def install(session: nox.Session, *packages: str, groups: tuple[str, ...] = ()) -> None:
    """Install packages of this workspace in place, with all their extras, and dependency groups of the root."""
    wanted = [f"--group={group}" for group in groups]
    for package in packages:
        wanted += ["-e", f"packages/hatnet-{package}[all]"]
    # what they need of each other comes from this workspace, not from a release
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
    session.run("python", "tools/check_prose.py", *PROSE)
    for schema, pattern in SCHEMAS.items():
        session.run("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, Path().glob(pattern)))


@nox.session
def typing(session: nox.Session) -> None:
    """Strict type checking of every package and of the scripts under tools/."""
    install(session, *PACKAGES, groups=("typing",))
    sources = [f"packages/hatnet-{package}/src" for package in PACKAGES]
    session.run("mypy", *sources, *map(str, Path("tools").glob("*.py")))


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def tests(session: nox.Session, package: str) -> None:
    """Test one package, such as "tests(core)"; arguments after -- go to pytest."""
    install(session, package, groups=GROUPS.get(package, ("test",)))
    session.run("pytest", *NOT_SLOW, *tested(package), *session.posargs, env=threads(package))


def tested(package: str) -> list[str]:
    """Return pytest's arguments for one package: its tests and the examples in its sources and README."""
    folder = f"packages/hatnet-{package}/tests"
    if package == "train":  # its examples start DeepSpeed
        return [folder, *TWO_AT_A_TIME, f"--ignore={FAULTS}"]
    examples = [f"packages/hatnet-{package}/src", f"packages/hatnet-{package}/README.md"]
    doctest = ["--doctest-modules", "--doctest-ignore-import-errors", "--doctest-glob=README.md"]
    return [folder, *examples, *doctest, *TWO_AT_A_TIME, f"--ignore={CONFIGS}"]


def threads(package: str) -> dict[str, str]:
    """One thread for each of the two that test at a time."""
    return {} if package == "train" else {"OMP_NUM_THREADS": "1"}


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def coverage(session: nox.Session, package: str) -> None:
    """Lines that all tests of a package run, slow ones too, in all processes they start; fails where too few."""
    install(session, package, groups=(*GROUPS.get(package, ("test",)), "coverage"))
    file = Path(session.create_tmp()).resolve() / "coverage"
    environment = {"COVERAGE_FILE": str(file)}
    modules = sorted(path.stem for path in Path(f"packages/hatnet-{package}/src").iterdir() if path.stem[0] != "_")
    session.run("coverage", "erase", env=environment)
    measured = ["coverage", "run", f"--source={','.join(modules)}", "-m", "pytest"]
    session.run(*measured, *EVERY, *tested(package), *session.posargs, env=environment | threads(package))
    if package == "train":  # most of what saves and resumes a run is tested by breaking one
        session.run(*measured, *NOT_SLOW, FAULTS, *session.posargs, env=environment)
    session.run("coverage", "combine", "--quiet", env=environment)
    session.run("coverage", "report", f"--fail-under={COVERED[package]}", env=environment)


@nox.session(python=OTHER_INTERPRETERS)
def interpreters(session: nox.Session) -> None:
    """Test hatnet-core on the other interpreters it declares, such as "interpreters-3.12"; skips absent ones."""
    install(session, "core", groups=("test",))
    session.run("pytest", *NOT_SLOW, "packages/hatnet-core/tests", *session.posargs)


@nox.session
def lowest(session: nox.Session) -> None:
    """Test hatnet-core with the lowest torch and other versions that it declares."""
    session.install("--resolution=lowest-direct", "-e", "packages/hatnet-core[all]", "--group=test")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    session.run("pytest", *NOT_SLOW, "packages/hatnet-core/tests", *session.posargs)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def slow(session: nox.Session, package: str) -> None:
    """Run the tests of one package that take minutes, such as "slow(core)"."""
    install(session, package, groups=GROUPS.get(package, ("test",)))
    paths = [f"packages/hatnet-{package}/tests", f"--ignore={FAULTS}"]
    session.run("pytest", "-m", "slow", *paths, *session.posargs, success_codes=[0, 5])


@nox.session
@nox.parametrize("form", ["short", "long"], ids=["short", "long"])
def faults(session: nox.Session, form: str) -> None:
    """Kill training runs, fill their disk, damage their files; "faults(long)" tries all of it."""
    install(session, "train", groups=("test",))
    session.run("pytest", *{"short": NOT_SLOW, "long": EVERY}[form], FAULTS, *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """Open and click the pages of hatnet-train and hatnet-analysis in headless Chromium; skipped without one."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        session.skip("no browser: expected chromium on the PATH, or its path in CHROMIUM (apt-get install chromium)")
    install(session, *BROWSER, groups=("test", "browser"))
    for folder in BROWSER.values():
        session.run("pytest", folder, *session.posargs, env={"CHROMIUM": found})


@nox.session
def forks(session: nox.Session) -> None:
    """Test hatnet-dense on the community's forks of MMDetection and MMSegmentation."""
    groups = [f"--group={group}" for group in GROUPS["dense"]]
    here = ["-e", "packages/hatnet-core", "-e", "packages/hatnet-dense[deepspeed]"]
    session.install("-c", "constraints.txt", *FORKS, "ftfy", "regex", *groups, *here)
    session.run("hatnet-dense", "doctor")
    session.run("pytest", *NOT_SLOW, "packages/hatnet-dense/tests", *session.posargs)


@nox.session
def dense_training(session: nox.Session) -> None:
    """Train Mask R-CNN, RetinaNet and Semantic FPN from scratch on drawn shapes, to figures that have to be met."""
    install(session, "dense", groups=("photographs",))
    session.run("python", "benchmarks/run.py", "dense", "shapes", *(session.posargs or ["--out", "docs/benchmarks"]))


@nox.session
def tools(session: nox.Session) -> None:
    """Test the scripts under tools/."""
    session.install("-c", "constraints.txt", "--group=tools")
    session.run("pytest", "tools/tests", *session.posargs)


@nox.session
def changes(session: nox.Session) -> None:
    """Fail where a package's sources changed since origin/main, or "-- COMMIT", without a news fragment."""
    session.install("-c", "constraints.txt", "--group=tools")
    base, *_ = session.posargs or ["origin/main"]
    known = session.run("git", "merge-base", base, "HEAD", external=True, silent=True, success_codes=[0, 1, 128])
    if not known or "fatal" in str(known):
        session.skip(f"this clone does not know {base}: git fetch --unshallow, or name a commit after --")
    for package in (f"packages/hatnet-{name}" for name in PACKAGES):
        changed = ["git", "diff", "--name-only", f"{base}...", "--", f"{package}/src", f"{package}/pyproject.toml"]
        if session.run(*changed, external=True, silent=True):
            settings = ["--config", "pyproject.toml", "--dir", package]
            session.run("towncrier", "check", "--compare-with", base, *settings)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def bump(session: nox.Session, package: str) -> None:
    """Write the next version of a package and its changelog: "bump(core)" -- major, minor, patch or a version."""
    session.install("-c", "constraints.txt", "--group=tools")
    session.run("python", "tools/release.py", f"hatnet-{package}", *session.posargs)


@nox.session
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def wheels(session: nox.Session, package: str) -> None:
    """Build a package, check what is in it, and use its wheel, or that of "-- dist", outside of the checkout."""
    dist = Path(*session.posargs).resolve() if session.posargs else Path(session.create_tmp()).resolve()
    if not session.posargs:
        build(session, package, dist)
    (wheel,) = dist.glob(f"hatnet_{package}-*.whl")
    here, core = Path.cwd(), [] if package == "core" else [str(Path("packages/hatnet-core").resolve())]
    session.install("-c", "constraints.txt", str(wheel), *core)
    # torch warns that NumPy, which it does not require, is missing
    python = ["python", "-W", "error", "-W", "ignore:Failed to initialize NumPy", "-W", "ignore:pkg_resources"]
    with session.chdir(session.create_tmp()):
        session.run(*python, "-c", f"import hatnet_{package}")
        if package == "core":
            session.run("hatnet-export", success_codes=[1])  # names the extra that is missing
            session.run(*python, here / "tools/first_block.py", here / "packages/hatnet-core/README.md")
            session.install("-c", here / "constraints.txt", f"hatnet-core[cli] @ {wheel.as_uri()}")
        for command in COMMANDS[package]:
            session.run(command, "--help", silent=True)
        if package == "dense":
            session.run("hatnet-dense", "doctor", success_codes=[1])  # names MMCV and the others
        if package == "analysis":
            session.run(*python[:1], "-m", "doctest", here / "packages/hatnet-analysis/README.md")


@nox.session
def release(session: nox.Session) -> None:
    """Build what a tag names, "release" -- hatnet-core-v1.2.0, into dist/; fails where tag and version disagree."""
    session.install("-c", "constraints.txt", "--group=tools")
    (tag,) = session.posargs or [""]
    name, _, version = tag.rpartition("-v")
    package = name.removeprefix("hatnet-")
    if package not in PACKAGES:
        session.error(f"the tag must be such as hatnet-core-v1.2.0, got {tag!r}")
    if f"\n## {version} " not in Path(f"packages/{name}/CHANGELOG.md").read_text():
        session.error(f"packages/{name}/CHANGELOG.md: there is no section {version}, which nox -s bump writes")
    build(session, package, Path("dist"))
    if not [*Path("dist").glob(f"hatnet_{package}-{version}-*.whl")]:
        session.error(f"the version in {name} must be {version}, got {[path.name for path in Path('dist').iterdir()]}")


def build(session: nox.Session, package: str, folder: Path) -> None:
    """Build an sdist, and from it a wheel, whose metadata and contents are checked."""
    session.run_install("uv", "build", "--quiet", "--clear", f"packages/hatnet-{package}", "--out-dir", str(folder))
    with_constraints = ["uv", "tool", "run", "--quiet", "--constraints", "constraints.txt"]
    files = [str(file) for file in folder.glob("hatnet_*")]
    session.run_install(*with_constraints, "twine", "check", "--strict", *files)
    # the names of MMDetection's configs cannot be imported, and need not
    sources = ["--package", f"packages/hatnet-{package}/src/hatnet_{package}", "--ignore", "W004"]
    session.run_install(*with_constraints, "check-wheel-contents", *sources, *(f for f in files if f.endswith(".whl")))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site, docs/_build/html, and run the blocks of its pages; "-- docs/start.md" runs those of one page."""
    packages = ["hatnet-core[all]", "hatnet-train[all]", "hatnet-analysis[timm]", "hatnet-dense"]
    wanted = [argument for package in packages for argument in ("-e", f"packages/{package}")]
    session.install("-c", "constraints.txt", "--group=docs", "--group=ecosystem", *wanted)
    session.run("sphinx-build", "-W", "--keep-going", "--quiet", "docs", "docs/_build/html")
    session.run("pytest", *TWO_AT_A_TIME, *(session.posargs or ["docs"]), env={"OMP_NUM_THREADS": "1"})


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
    session.run("python", "benchmarks/run.py", subject, *(session.posargs or ["--out", "docs/benchmarks"]))


@nox.session
def gpu_dry(session: nox.Session) -> None:
    """Run the measurements of benchmarks/gpu on a CPU, tiny and interpreted, to try the scripts."""
    session.install("-c", "constraints.txt", "-e", "packages/hatnet-core", "-e", "packages/hatnet-train[all]")
    environment = {"HATNET_GPU_DRY": "1", "OUT": session.create_tmp(), "PYTHON": "python"}
    session.run("bash", "benchmarks/gpu/check.sh", *session.posargs, env=environment, external=True)
    if not session.posargs:
        environment["PYTHONPATH"] = "packages/hatnet-core/src"
        session.run("python", "benchmarks/gpu/accuracy.py", "--epochs", "1", "--seeds", "2", env=environment)


@nox.session
def bench_guard(session: nox.Session) -> None:
    """Measure the ratios of "bench(core)" again; fails where one is 15 % behind the latest that is recorded."""
    session.install("-c", "constraints.txt", *BENCHMARKS["core"])
    recorded = max(Path("docs/benchmarks").glob("*-core.json"), default=None)
    if recorded is None:
        session.error("docs/benchmarks has no report to compare with: expected one of nox -s 'bench(core)'")
    out = session.create_tmp()
    chosen = session.posargs or ["inference", "variants", "training"]
    session.run("python", "benchmarks/run.py", "core", *chosen, "--out", out, "--against", str(recorded))


@nox.session
def pull_request(session: nox.Session) -> None:
    """Queue lint, types, and the tests of what changed since origin/main, or since "-- COMMIT"."""
    base, *_ = session.posargs or ["origin/main"]
    changed = session.run("git", "diff", "--name-only", f"{base}...", external=True, silent=True)
    files = str(changed).split()
    prefixes = {package: f"packages/hatnet-{package}/" for package in PACKAGES}
    # what all packages share, or build on, is a reason to test all of them
    everything = any(f.startswith((prefixes["core"], "testing/")) or ("/" not in f and f[-2:] != "md") for f in files)
    chosen = [p for p in PACKAGES if everything or any(file.startswith(prefixes[p]) for file in files)]
    for name in ["lint", "typing", "tools", *(f"tests({package})" for package in chosen)]:
        session.notify(name, posargs=())
    if "train" in chosen:
        session.notify("faults(short)", posargs=())


@nox.session
def nightly(session: nox.Session) -> None:
    """Everything that plain nox leaves to the night."""
    for name in NIGHTLY:
        session.notify(name)
