"""A release in a copy of the repository's metadata, by the real hatchling, towncrier and git."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import release  # noqa: E402  a script: its folder goes onto the path first

PACKAGES = sorted(file.parent.name for file in ROOT.glob("packages/*/pyproject.toml"))


def git(*arguments):
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with the metadata of all packages, one news fragment each, nothing released."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in PACKAGES:
        about = Path("packages", name, "src", name.replace("-", "_"), "__about__.py")
        for file in (about, Path("packages", name, "pyproject.toml"), Path("packages", name, "CHANGELOG.md")):
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, file)
        about.write_text('__version__ = "0.1.0"\n')
        (tmp_path / "packages" / name / "changes").mkdir()
        (tmp_path / "packages" / name / "changes" / "+x.added.md").write_text(f"News of {name}.\n")
    git("init", "--quiet")
    commit()
    return tmp_path


def commit():
    git("add", ".")
    git("commit", "--quiet", "--message", "x")


def refused(arguments, named):
    with pytest.raises(SystemExit) as ended:
        release.bump(*arguments)
    assert named in str(ended.value)
    assert git("status", "--porcelain", "--", "packages/*/pyproject.toml", "packages/*/src", "*.md") == ""


def test_a_first_release_keeps_its_version_and_fills_the_changelog(repository):
    release.bump("hatnet-core", "0.1.0")
    changelog = (repository / "packages/hatnet-core/CHANGELOG.md").read_text()
    assert "## 0.1.0 (" in changelog
    assert "News of hatnet-core." in changelog
    assert not list((repository / "packages/hatnet-core/changes").glob("*.md"))


def test_a_version_beyond_a_range_widens_it_and_says_so_in_the_news(repository):
    release.bump("hatnet-core", "minor")
    for name in ("hatnet-train", "hatnet-dense", "hatnet-analysis"):
        file = repository / "packages" / name / "pyproject.toml"
        assert all(wanted.specifier.contains("0.2.0") for wanted in release.requirements(file, "hatnet-core"))
        assert "0.2" in (file.parent / "changes/+hatnet-core-range.changed.md").read_text()
    assert git("diff", "--name-only") == ""  # all is staged


def test_a_patch_widens_nothing(repository):
    release.bump("hatnet-core", "patch")
    staged = git("diff", "--cached", "--name-only").split()
    assert all(name.startswith("packages/hatnet-core/") for name in staged)
    assert 'version__ = "0.1.1"' in git("diff", "--cached")


@pytest.mark.parametrize("step", ["huge", "1.0", "0.0.9", "1.0.0rc1"])
def test_a_step_that_is_none_changes_nothing(step, repository):
    refused(("hatnet-core", step), step)


def test_changes_that_are_not_committed_are_kept(repository):
    (repository / "packages/hatnet-core/notes").write_text("mine")
    with pytest.raises(SystemExit):
        release.bump("hatnet-core", "minor")
    assert (repository / "packages/hatnet-core/notes").read_text() == "mine"


def test_nothing_is_released_twice_or_without_news(repository):
    release.bump("hatnet-core", "0.1.0")
    commit()
    refused(("hatnet-core", "minor"), "changes")
    (repository / "packages/hatnet-core/changes").mkdir(exist_ok=True)
    (repository / "packages/hatnet-core/changes/+y.fixed.md").write_text("Fixed.\n")
    commit()
    refused(("hatnet-core", "0.1.0"), "0.1.0")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_admits_the_versions_of_the_others_up_to_the_next_break(package):
    assert (ROOT / "packages" / package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    for other in PACKAGES:
        version = Version(release.run("hatchling", "version", cwd=ROOT / "packages" / other))
        end = f"<0.{version.minor + 1}" if version.major == 0 else f"<{version.major + 1}"
        for wanted in release.requirements(ROOT / "packages" / package / "pyproject.toml", other):
            assert not wanted.specifier or {end} < {str(part) for part in wanted.specifier}, str(wanted)
            assert wanted.specifier.contains(version)
