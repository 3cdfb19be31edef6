"""Versions, changelogs and tags of the packages: what ``nox -s bump``, ``changes``, ``lowest`` and ``release`` call.

Every package under ``packages/`` has a version of its own in ``__about__.py``, a changelog that towncrier builds from
the fragments in ``changes/``, and tags such as ``hatnet-core-v1.2.0``. A version is released when the changelog has a
section of it. Versions are three numbers: there are no pre-releases. Runs in the root of the repository; what goes
wrong is one line and exit status 1.
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
from packaging.specifiers import SpecifierSet
from packaging.version import Version

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
        found = re.findall(r"^## (\S+)", self.changelog.read_text(), re.MULTILINE)
        return [version for version in map(parsed, found) if version]

    @property
    def tags(self) -> dict[Version, str]:
        """The tags of this package's releases that this clone has, by version."""
        prefix = f"{self.name}-v"
        found = git("tag", "--list", f"{prefix}*").split()
        return {version: tag for tag in found if (version := parsed(tag.removeprefix(prefix)))}

    @property
    def siblings(self) -> list[Requirement]:
        """What it requires, with all of its extras, of the other packages."""
        project = tomllib.loads(self.pyproject.read_text())["project"]
        listed = itertools.chain(project["dependencies"], *project.get("optional-dependencies", {}).values())
        others = {*names()} - {self.name}
        return [wanted for wanted in map(Requirement, listed) if wanted.name in others]

    def ranges(self, package: Package) -> list[SpecifierSet]:
        """The versions of ``package`` that it admits, once for each of its requirements."""
        return [wanted.specifier for wanted in self.siblings if wanted.name == package.name]

    @property
    def fragments(self) -> list[Path]:
        """The news fragments since the last release, all of a type that towncrier knows, none of them empty."""
        settings = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["towncrier"]
        types = sorted(table["directory"] for table in settings["type"])
        found = sorted(path for path in (self.folder / "changes").glob("*") if path.name != ".gitkeep")
        for path in found:
            if not re.fullmatch(rf"(\+[^.]+|[0-9]+)\.({'|'.join(types)})\.md", path.name):
                expected = f"+WORDS.TYPE.md or NUMBER.TYPE.md, TYPE one of {', '.join(types)}"
                fail(f"{path} is no fragment by its name: expected {expected}")
            if not path.read_text().strip():
                fail(f"{path} is empty: expected a sentence or two on what changes for users")
        return found


def bump(package: Package, step: str) -> None:
    """Write the next version and its section of the changelog, and widen the ranges of the packages that exclude it.

    All or nothing. Prints the tag to make, and the packages to release after this one.
    """
    target = _target(package, step)
    tag = f"{package.name}-v{target}"
    if target in package.tags:
        fail(f"tag {tag} exists: expected a version that is not released")
    dependants = [other for other in packages() if not all(r.contains(target) for r in other.ranges(package))]
    folders = [str(changed.folder) for changed in (package, *dependants)]
    if changed := git("status", "--porcelain", "--", *folders):
        fail(f"{changed.split()[-1]} has changes that are not committed: commit them first")
    if not package.fragments:
        fail(f"{package.folder}/changes holds no fragment: there is nothing to release")
    before = package.version
    with _restored_on_failure(package, *dependants):
        for other in dependants:
            git("add", "--", *_widen(other, package, target))
        _towncrier("build", "--yes", "--version", str(target), package=package)
        package.about.write_text(f'__version__ = "{target}"\n')
        git("add", "--", str(package.about))
    say(f"{package.name} {before} -> {target}: {package.about}, {package.changelog}")
    for other in dependants:
        say(f"{other.name} admits it: {other.pyproject}, {_news(other, package)}")
    say(f"commit, then: git tag -a {tag} -m '{package.name} {target}' && git push --atomic origin main {tag}")
    if dependants:
        say(f"then release those whose last release excludes it: {', '.join(other.name for other in dependants)}")


def _target(package: Package, step: str) -> Version:
    """The version that ``major``, ``minor``, ``patch`` or an explicit version mean for this package."""
    current = package.version
    if step in STEPS:
        kept = [*current.release[: STEPS.index(step)], current.release[STEPS.index(step)] + 1]
        return Version(".".join(str(part) for part in [*kept, 0, 0][:3]))
    if not (target := parsed(step)):
        expected = f"{', '.join(STEPS)}, or three numbers such as 1.2.0 (no pre-release)"
        fail(f"cannot bump {package.name} to {step!r}: expected {expected}")
    if target < current:
        fail(f"cannot bump {package.name} to {target}: it is at {current}, and versions only rise")
    if target in package.released:
        fail(f"cannot bump {package.name} to {target}: {package.changelog} says that it is released")
    return target


def _widen(other: Package, package: Package, target: Version) -> list[str]:
    """Let the ranges of ``package`` in ``other`` end at the next break after ``target``; returns the files written."""
    below = f"0.{target.minor + 1}" if target.major == 0 else f"{target.major + 1}"
    requirement = rf"""(["']{package.name}(?:\[[^]]*\])?(?![-\w])[^"'<;]*<)[0-9.]+"""
    other.pyproject.write_text(re.sub(requirement, rf"\g<1>{below}", other.pyproject.read_text()))
    for range_ in other.ranges(package):
        if not range_.contains(target):
            expected = f"a range that ends, such as >={package.version},<{below}"
            fail(f"{other.pyproject} requires {package.name}{range_}: expected {expected}")
    _news(other, package).write_text(f"Works with {package.name} {target.major}.{target.minor}.\n")
    return [str(other.pyproject), str(_news(other, package))]


def _news(other: Package, package: Package) -> Path:
    """The fragment that says which ``package`` is admitted; there is one until ``other`` is released."""
    return other.folder / "changes" / f"+{package.name}-range.changed.md"


@contextmanager
def _restored_on_failure(package: Package, *dependants: Package) -> Iterator[None]:
    """Whatever ends the block early, an interruption too, leaves the packages as they were."""
    touched = (package, *dependants)
    before = {path: path.read_bytes() for path in (package.about, package.changelog)}
    before |= {path: path.read_bytes() for each in touched for path in (each.pyproject, *each.fragments)}
    try:
        yield
    except BaseException:
        git("reset", "--quiet", "--", *(str(each.folder) for each in touched))
        for other in dependants:
            _news(other, package).unlink(missing_ok=True)
        for path, content in before.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        raise


def changes(base: str | None) -> None:
    """Fail for every package whose sources changed without a fragment; see ``_reference`` for: changed since when."""
    missing = []
    if base is not None and _rewritten(base):
        say(f"no commit {base} in all of the history here: judged as without it")
        base = None
    for package in packages():
        fragments = package.fragments
        since = _reference(package, base)
        if since is None and package.released:
            latest = package.released[0]
            say(f"{NOT_JUDGED}: {package.name} {latest} was released, and this clone has neither its tag nor a base")
        elif since is None:
            say(f"{package.name}: no release yet, {len(fragments)} fragments")
            missing += [] if fragments else [package]
        elif not _sources_changed(package, since):
            say(f"{package.name}: sources as at {since[:40]}")
        else:
            say(f"{package.name}: sources changed since {since[:40]}, {len(fragments)} fragments")
            missing += [] if _has_news(package, since) else [package]
    if missing:
        fail(
            "sources changed without a fragment: add packages/PACKAGE/changes/+WORDS.TYPE.md (see CONTRIBUTING.md) to",
            *(f"  {package.name}" for package in missing),
        )


def _rewritten(base: str) -> bool:
    """Whether this is what a push that follows nothing names: zeros for a new branch, a commit that was dropped."""
    known = git("rev-parse", "--verify", "--quiet", f"{base}^{{commit}}", check=False)
    whole = git("rev-parse", "--is-shallow-repository") == "false"
    return bool(re.fullmatch("[0-9a-f]{40}", base)) and whole and not known


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
    return package.tags.get(package.released[0]) if package.released else None


def _sources_changed(package: Package, since: str) -> bool:
    sources = [str(package.folder / "src"), str(package.pyproject)]
    return bool(git("diff", "--name-only", f"{since}...", "--", *sources))


def _has_news(package: Package, since: str) -> bool:
    """Whether a fragment was added, or the changelog itself changed, as it does at a release."""
    added = git("diff", "--name-only", "--diff-filter=d", f"{since}...", "--", str(package.folder / "changes"))
    changelog = git("diff", "--name-only", f"{since}...", "--", str(package.changelog))
    return bool(changelog) or any(str(path) in added.splitlines() for path in package.fragments)


def tagged(tag: str) -> None:
    """Print the package that ``tag`` releases; fail where the tag, the sources and main disagree."""
    found = re.fullmatch(r"(hatnet-[a-z]+)-v(.+)", tag)
    if not found or found[1] not in names():
        fail(f"{tag!r} is no tag of a release: expected PACKAGE-vVERSION, PACKAGE one of {', '.join(names())}")
    package = Package(found[1])
    if found[2] != str(package.version):
        fail(f"tag {tag} says {found[2]}, {package.about} says {package.version}: expected the same version")
    if package.version not in package.released:
        fail(f"{package.changelog} has no section of {package.version}: expected what nox -s bump writes")
    if git("merge-base", "HEAD", MAIN, check=False) != (head := git("rev-parse", "HEAD")):
        fail(f"the commit of {tag}, {head[:12]}, is not on {MAIN} as this clone knows it: expected one that is")
    say(package.name.removeprefix("hatnet-"))


def lowest(package: Package, out: Path) -> None:
    """Print, last, the folder of the lowest hatnet-core that ``package`` admits: of its tag, else the workspace's."""
    core = Package("hatnet-core")
    (wanted,) = (requirement for requirement in package.siblings if requirement.name == core.name)
    admitted = sorted(wanted.specifier.filter(core.tags))
    if admitted:
        tag = core.tags[admitted[0]]
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


def parsed(version: str) -> Version | None:
    """A version that can be released, which is three numbers; None for any other text."""
    return Version(version) if re.fullmatch(r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){2}", version) else None


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
