"""Prepare a release: ``nox -s "bump(core)" -- minor`` calls this script in the root of the repository.

hatchling writes the version and towncrier the changelog. No tool does the rest: a package declares which versions of
another it works with, such as ``hatnet-core>=0.1,<0.2``, and a version beyond that range widens it.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def bump(package: str, step: str) -> None:
    """Write and stage the next version of a package, its changelog, and the ranges of its dependants; or nothing.

    Args:
        package: name of the distribution.
        step: major, minor, patch, or a version of three numbers; the present one for a first release.

    Raises:
        SystemExit: naming the problem, such as changes that are not committed.
    """
    folder = Path("packages", package)
    if changed := run("git", "status", "--porcelain", "--", "packages"):
        sys.exit(f"{changed.split()[-1]}: commit or remove it first")
    if not list((folder / "changes").glob("*.md")):
        sys.exit(f"{folder}/changes: there is no news fragment, and so nothing to release")
    try:
        version = next_version(folder, step)
        widened = [other for other in dependants(package, version) if widen(other, package, version)]
        towncrier = ["build", "--yes", "--version", str(version), "--dir", str(folder), "--config", "pyproject.toml"]
        run(sys.executable, "-m", "towncrier", *towncrier)
        run("git", "add", "--", "packages")
    except BaseException:
        run("git", "restore", "--staged", "--worktree", "--", "packages")
        run("git", "clean", "--quiet", "--force", "--", "packages")
        raise
    tag = f"{package}-v{version}"
    sys.stdout.write(f"{package} {version}: commit, then git tag -a {tag} -m '{package} {version}'\n")
    for other in widened:
        sys.stdout.write(f"{other} admits it from its next release on, which is due\n")


def next_version(folder: Path, step: str) -> Version:
    """Write the version that ``step`` means, unless it is the present one, and return it."""
    if not re.fullmatch(r"major|minor|patch|\d+\.\d+\.\d+", step):
        sys.exit(f"STEP must be major, minor, patch or three numbers such as 1.2.0, got {step!r}")
    if step != (before := run("hatchling", "version", cwd=folder)):
        run("hatchling", "version", step, cwd=folder)
    elif f"\n## {before} " in (folder / "CHANGELOG.md").read_text():
        sys.exit(f"{folder}/CHANGELOG.md: {before} was released")
    return Version(run("hatchling", "version", cwd=folder))


def dependants(package: str, version: Version) -> Iterator[str]:
    """Names of the packages with a requirement that excludes a version of another."""
    for file in sorted(Path("packages").glob("*/pyproject.toml")):
        if any(not requirement.specifier.contains(version) for requirement in requirements(file, package)):
            yield file.parent.name


def requirements(file: Path, package: str) -> list[Requirement]:
    """Return what a ``pyproject.toml`` requires of a package, with all extras."""
    project = tomllib.loads(file.read_text())["project"]
    listed = itertools.chain(project["dependencies"], *project.get("optional-dependencies", {}).values())
    return [wanted for wanted in map(Requirement, listed) if wanted.name == package != project["name"]]


def widen(other: str, package: str, version: Version) -> bool:
    """Let the ranges of ``package`` in ``other`` end at the next break after ``version``, and add a news fragment."""
    below = f"0.{version.minor + 1}" if version.major == 0 else f"{version.major + 1}"
    file = Path("packages", other, "pyproject.toml")
    ranges = rf"""(["']{package}(?:\[[^]]*\])?(?![-\w])[^"'<;]*<)[0-9.]+"""
    file.write_text(re.sub(ranges, rf"\g<1>{below}", file.read_text()))
    for requirement in requirements(file, package):
        if not requirement.specifier.contains(version):
            sys.exit(f"{file}: the range of {requirement} must have an end, such as <{below}")
    news = file.with_name("changes") / f"+{package}-range.changed.md"
    news.parent.mkdir(exist_ok=True)
    news.write_text(f"Works with {package} {version.major}.{version.minor}.\n")
    return True


def run(*command: str, cwd: Path | None = None) -> str:
    """Return the output of a program; its last line of complaint ends this one."""
    program = Path(sys.executable).parent / command[0]
    first = str(program) if program.exists() else command[0]
    done = subprocess.run([first, *command[1:]], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return done.stdout.strip()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tools/release.py PACKAGE major|minor|patch|VERSION")
    bump(sys.argv[1], sys.argv[2])
