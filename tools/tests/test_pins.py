"""Versions and rules that are written in more than one place, compared."""

import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import release  # noqa: E402  a script: its folder goes onto the path first


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def hooks():
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    return [hook for repository in settings["repos"] for hook in repository["hooks"]]


def test_pre_commit_checks_with_the_versions_of_the_lint_session():
    pinned = {requirement for hook in hooks() for requirement in hook.get("additional_dependencies", [])}
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    assert pinned <= set(constraints)
    assert {requirement.partition("==")[0] for requirement in pinned} == {"ruff", "codespell"}


def test_pre_commit_and_the_sessions_run_the_same_tools():
    noxfile = (ROOT / "noxfile.py").read_text()
    for command in ('"ruff", "check"', '"ruff", "format"', '"codespell"', '"mypy"'):
        assert command in noxfile
    assert {hook["id"] for hook in hooks()} == {"ruff", "ruff-format", "codespell", "mypy"}


@pytest.mark.parametrize("package", release.packages(), ids=lambda package: package.name)
def test_what_a_package_requires_of_another_admits_the_one_beside_it(package):
    for requirement in package.siblings:
        beside = release.Package(requirement.name).version
        assert requirement.specifier.contains(beside, prereleases=True), f"{package.name}: {requirement}, {beside}"


@pytest.mark.parametrize("package", release.packages(), ids=lambda package: package.name)
def test_what_a_package_requires_of_another_ends_where_the_next_break_may_come(package):
    """Below 1.0 at the next minor version, from 1.0 on at the next major one, and it begins somewhere."""
    for requirement in package.siblings:
        if not requirement.specifier:  # an extra that names extras of another package once more
            continue
        beside = release.Package(requirement.name).version
        end = Version(f"0.{beside.minor + 1}") if beside.major == 0 else Version(f"{beside.major + 1}")
        assert {part.operator for part in requirement.specifier} == {">=", "<"}, str(requirement)
        assert f"<{end}" in str(requirement.specifier).split(",")


@pytest.mark.parametrize("package", release.packages(), ids=lambda package: package.name)
def test_every_package_carries_the_licence_of_the_repository(package):
    assert (package.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("package", release.packages(), ids=lambda package: package.name)
def test_the_version_is_what_the_changelog_says_last_or_later(package):
    assert all(package.version >= version for version in package.released)
    assert package.fragments or package.version in package.released


def test_the_interpreters_of_hatnet_core_are_those_that_sessions_run():
    project = tomllib.loads((ROOT / "packages/hatnet-core/pyproject.toml").read_text())["project"]
    declared = {line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line}
    noxfile = (ROOT / "noxfile.py").read_text()
    assert f"OTHER_INTERPRETERS = {sorted(declared - {'3.11'})}".replace("'", '"') in noxfile
