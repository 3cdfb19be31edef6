"""Versions, changelogs and tags of the packages: what ``nox -s bump``, ``changes``, ``lowest`` and ``release`` call.

Every package under ``packages/`` has a version of its own in ``__about__.py``, a changelog that towncrier builds from
the fragments in ``changes/``, and tags such as ``hatnet-core-v1.2.0``. A version is released when the changelog has a
section of it. Runs in the root of the repository; what goes wrong is one line and exit status 1.
"""

from __future__ import annotations

import argparse
import io
import itertools
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

STEPS = ("major", "minor", "patch")
MAIN = "origin/main"
NOT_JUDGED = "not judged"
"""Begins the line of a package about which this clone cannot tell whether a fragment is missing."""


@dataclass(frozen=True)
class Package:
    """One of the packages; ``name`` is that of its distribution."""

    name: str

    @property
    def folder(self) -> Path:
        return Path("packages", self.name)

    @property
    def about(self) -> Path:
        return self.folder / "src" / self.name.replace("-", "_") / "__about__.py"

    @property
    def changelog(self) -> Path:
        return self.folder / "CHANGELOG.md"

    @property
    def pyproject(self) -> Path:
        return self.folder / "pyproject.toml"

    @property
    def version(self) -> Version:
        """What ``__about__.py`` says."""
        return Version(self.about.read_text().split('"')[1])

    @property
    def released(self) -> list[Version]:
        """The versions that have a section in the changelog, the latest first."""
        return [Version(found) for found in re.findall(r"^## (\S+)", self.changelog.read_text(), re.MULTILINE)]

    @property
    def tags(self) -> list[str]:
        """The tags of this package that this clone has, the lowest version first."""
        found = git("tag", "--list", f"{self.name}-v[0-9]*").split()
        return sorted(found, key=lambda tag: Version(tag.rpartition("-v")[2]))

    @property
    def siblings(self) -> list[Requirement]:
        """What it requires, with all of its extras, of the other packages."""
        project = tomllib.loads(self.pyproject.read_text())["project"]
        listed = itertools.chain(project["dependencies"], *project.get("optional-dependencies", {}).values())
        others = {*names()} - {self.name}
        return [wanted for wanted in map(Requirement, listed) if wanted.name in others]

    @property
    def fragments(self) -> list[Path]:
        """The news fragments since the last release, all of a type that towncrier knows."""
        settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["towncrier"]
        types = sorted(table["directory"] for table in settings["type"])
        found = sorted(path for path in (self.folder / "changes").glob("*") if path.name != ".gitkeep")
        for path in found:
            if not re.fullmatch(rf"[^.]+\.({'|'.join(types)})\.md", path.name):
                fail(f"{path} is no fragment by its name: expected +WORDS.TYPE.md, TYPE one of {', '.join(types)}")
        return found


def bump(package: Package, step: str) -> None:
    """Write the next version and its section of the changelog, all or nothing, and print the tag to make."""
    target = _target(package, step)
    tag = f"{package.name}-v{target}"
    if tag in package.tags:
        fail(f"tag {tag} exists: expected a version that is not released")
    if changed := git("status", "--porcelain", "--", str(package.folder)):
        fail(f"{package.folder} has changes that are not committed: {changed.split()[-1]}; commit them first")
    if not package.fragments:
        fail(f"{package.folder}/changes holds no fragment: there is nothing to release")
    if narrow := list(_too_narrow(package, target)):
        fail(f"{package.name} {target} is outside of what others declare; edit these, then bump again:", *narrow)
    before = package.version
    with _restored_on_failure(package):
        _towncrier("build", "--yes", "--version", str(target), package=package)
        package.about.write_text(f'__version__ = "{target}"\n')
        git("add", "--", str(package.about))
    say(f"{package.name} {before} -> {target}: {package.about}, {package.changelog}")
    say(f"commit, then: git tag -a {tag} -m '{package.name} {target}' && git push origin {tag}")


def _target(package: Package, step: str) -> Version:
    """The version that ``major``, ``minor``, ``patch`` or an explicit version mean for this package."""
    current = package.version
    if step in STEPS:
        kept = [*current.release[: STEPS.index(step)], current.release[STEPS.index(step)] + 1]
        return Version(".".join(str(part) for part in [*kept, 0, 0][:3]))
    try:
        target = Version(step)
    except InvalidVersion:
        fail(f"cannot bump {package.name} to {step!r}: expected {', '.join(STEPS)}, or a version such as 1.2.0")
    if str(target) != step or len(target.release) != 3 or target.local:
        fail(f"cannot bump {package.name} to {step!r}: expected three numbers, such as 1.2.0 or 1.2.0rc1")
    if target < current:
        fail(f"cannot bump {package.name} to {target}: it is at {current}, and versions only rise")
    if target in package.released:
        fail(f"cannot bump {package.name} to {target}: {package.changelog} says that it is released")
    return target


def _too_narrow(package: Package, target: Version) -> Iterator[str]:
    """Lines that say which requirements of the other packages exclude ``target``, and what would not."""
    below = f"<0.{target.minor + 1}" if target.major == 0 else f"<{target.major + 1}"
    for other in packages():
        for requirement in other.siblings:
            if requirement.name == package.name and not requirement.specifier.contains(target, prereleases=True):
                kept = [str(part) for part in requirement.specifier if part.operator.startswith(">")]
                extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
                yield f"  {other.pyproject}: {requirement} -> {requirement.name}{extras}{','.join([*kept, below])}"


@contextmanager
def _restored_on_failure(package: Package) -> Iterator[None]:
    """Whatever ends the block early, an interruption too, leaves version, changelog and fragments as they were."""
    before = {path: path.read_bytes() for path in (package.about, package.changelog, *package.fragments)}
    try:
        yield
    except BaseException:
        git("reset", "--quiet", "--", str(package.folder))
        for path, content in before.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        raise


def changes(base: str | None) -> None:
    """Fail for every package whose sources changed without a fragment; see ``_reference`` for: changed since when."""
    missing = []
    for package in packages():
        since = _reference(package, base)
        if since is None and package.released:
            latest = package.released[0]
            say(f"{NOT_JUDGED}: {package.name} {latest} was released, and this clone has neither its tag nor a base")
        elif since is None:
            say(f"{package.name}: no release yet, {len(package.fragments)} fragments")
            missing += [] if package.fragments else [package]
        elif not _sources_changed(package, since):
            say(f"{package.name}: sources as at {since[:40]}")
        else:
            say(f"{package.name}: sources changed since {since[:40]}, {len(package.fragments)} fragments")
            missing += [] if _has_news(package, since) else [package]
    if missing:
        fail(
            "sources changed without a fragment: add packages/PACKAGE/changes/+WORDS.TYPE.md (see CONTRIBUTING.md) to",
            *(f"  {package.name}" for package in missing),
        )


def _reference(package: Package, base: str | None) -> str | None:
    """What sources are compared with: ``base``, else where this branch left main, else the last release, if known."""
    if base is not None:
        if not git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}", check=False):
            fail(f"no commit {base} in this clone: expected a branch, tag or commit (a shallow clone lacks most)")
        if not (merge_base := git("merge-base", base, "HEAD", check=False)):
            fail(f"{base} and HEAD have no commit in common here: a shallow clone needs git fetch --unshallow")
        return merge_base
    merge_base = git("merge-base", MAIN, "HEAD", check=False)
    if merge_base and merge_base != git("rev-parse", "HEAD"):
        return merge_base
    latest = f"{package.name}-v{package.released[0]}" if package.released else None
    return latest if latest in package.tags else None


def _sources_changed(package: Package, since: str) -> bool:
    sources = [str(package.folder / "src"), str(package.pyproject)]
    return bool(git("diff", "--name-only", f"{since}...", "--", *sources))


def _has_news(package: Package, since: str) -> bool:
    """Whether a fragment was added, or the changelog itself changed, as it does at a release."""
    added = git("diff", "--name-only", "--diff-filter=d", f"{since}...", "--", str(package.folder / "changes"))
    changelog = git("diff", "--name-only", f"{since}...", "--", str(package.changelog))
    return bool(changelog) or any(str(path) in added.splitlines() for path in package.fragments)


def tagged(tag: str) -> None:
    """Print the package that ``tag`` releases; fail where the tag and the sources disagree."""
    found = re.fullmatch(r"(hatnet-[a-z]+)-v(.+)", tag)
    if not found or found[1] not in names():
        fail(f"{tag!r} is no tag of a release: expected PACKAGE-vVERSION, PACKAGE one of {', '.join(names())}")
    package = Package(found[1])
    if found[2] != str(package.version):
        fail(f"tag {tag} says {found[2]}, {package.about} says {package.version}: expected the same version")
    if package.version not in package.released:
        fail(f"{package.changelog} has no section of {package.version}: expected what nox -s bump writes")
    say(package.name.removeprefix("hatnet-"))


def lowest(package: Package, out: Path) -> None:
    """Print, last, the folder of the lowest hatnet-core that ``package`` admits: of its tag, else the workspace's."""
    core = Package("hatnet-core")
    (wanted,) = (requirement for requirement in package.siblings if requirement.name == core.name)
    versions = {Version(tag.rpartition("-v")[2]): tag for tag in core.tags}
    admitted = sorted(wanted.specifier.filter(versions))
    if admitted:
        tag = versions[admitted[0]]
        say(f"{package.name} admits {wanted}: the lowest release is {tag}")
        archive = subprocess.run(["git", "archive", tag, str(core.folder)], capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(out, filter="data")
        say(str(out / core.folder))
    elif core.released:
        fail(f"{core.name} has releases, but none in {wanted.specifier} is tagged in this clone: git fetch --tags")
    else:
        say(f"{core.name} has no release yet: {package.name} is tested with the one of the workspace")
        say(str(core.folder))


def packages() -> list[Package]:
    return [Package(name) for name in names()]


def names() -> list[str]:
    return sorted(path.parent.name for path in Path("packages").glob("*/pyproject.toml"))


def git(*arguments: str, check: bool = True) -> str:
    """The output of a git command; what it complains about is one line, or nothing where ``check`` is false."""
    result = subprocess.run(["git", *arguments], capture_output=True, text=True)
    if check and result.returncode:
        fail(f"git {' '.join(arguments)}: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout.strip() if result.returncode == 0 else ""


def _towncrier(*arguments: str, package: Package) -> None:
    command = [
        sys.executable,
        "-m",
        "towncrier",
        *arguments,
        "--dir",
        str(package.folder),
        "--config",
        "pyproject.toml",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        fail(f"towncrier {arguments[0]}: {(result.stderr or result.stdout).strip().splitlines()[-1]}")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def fail(*lines: str) -> NoReturn:
    raise SystemExit("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("bump", "lowest"):
        commands.add_parser(name).add_argument("package", choices=names())
    commands.choices["bump"].add_argument("step", help=f"{', '.join(STEPS)}, or a version")
    commands.choices["lowest"].add_argument("out", type=Path, help="where to unpack a release")
    commands.add_parser("changes").add_argument("base", nargs="?", help=f"compare with it instead of {MAIN}")
    commands.add_parser("tagged").add_argument("tag")
    options = parser.parse_args()
    match options.command:
        case "bump":
            bump(Package(options.package), options.step)
        case "lowest":
            lowest(Package(options.package), options.out)
        case "changes":
            changes(options.base)
        case "tagged":
            tagged(options.tag)


if __name__ == "__main__":
    main()
