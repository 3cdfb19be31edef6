"""Bumps, news fragments and tags, each in a small repository of two packages that really is one of git."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hatnet_testing import check

ROOT = Path(__file__).parents[2]
ABOUT = "packages/hatnet-core/src/hatnet_core/__about__.py"
CHANGELOG = "# Changelog\n\n<!-- releases, the latest first; written by nox -s bump -->\n"
IDENTITY = {f"GIT_{who}_{what}": "somebody" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
ENVIRONMENT = {**os.environ, **IDENTITY, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}


class Repository:
    """A checkout of hatnet-core 0.1.0 and of hatnet-train 0.1.0, which requires it."""

    def __init__(self, folder):
        self.folder = folder

    def write(self, path, text):
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def read(self, path):
        return (self.folder / path).read_text()

    def git(self, *arguments):
        command = ["git", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=ENVIRONMENT, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self, message="A change"):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", message)

    def release(self, *arguments):
        """Run tools/release.py: its exit status, and what it prints."""
        command = [sys.executable, ROOT / "tools/release.py", *arguments]
        result = subprocess.run(command, cwd=self.folder, env=ENVIRONMENT, capture_output=True, text=True)
        assert "Traceback" not in result.stderr
        return result.returncode, result.stdout + result.stderr

    def content(self):
        """Every file's bytes, and what git says of them."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and ".git" not in path.parts]
        return {path: path.read_bytes() for path in files}, self.git("status", "--porcelain")


@pytest.fixture(scope="session")
def first_commit(tmp_path_factory):
    made = Repository(tmp_path_factory.mktemp("first") / "checkout")
    made.write("pyproject.toml", (ROOT / "pyproject.toml").read_text())
    for name, requirements in {"core": [], "train": ["hatnet-core[safetensors]>=0.1,<0.2"]}.items():
        made.write(f"packages/hatnet-{name}/src/hatnet_{name}/__about__.py", '__version__ = "0.1.0"\n')
        made.write(f"packages/hatnet-{name}/src/hatnet_{name}/__init__.py", "")
        made.write(f"packages/hatnet-{name}/pyproject.toml", f"[project]\ndependencies = {requirements}\n")
        made.write(f"packages/hatnet-{name}/CHANGELOG.md", CHANGELOG)
        made.write(f"packages/hatnet-{name}/changes/.gitkeep", "")
        made.write(f"packages/hatnet-{name}/changes/+first.added.md", f"What {name} is for,\non two lines.\n")
    made.git("init", "--quiet", "--initial-branch=main")
    made.commit("The first commit")
    return made


@pytest.fixture(scope="session")
def first_release(first_commit, tmp_path_factory):
    made = copied(first_commit, tmp_path_factory.mktemp("release"))
    for name in ("core", "train"):
        assert made.release("bump", f"hatnet-{name}", "0.1.0")[0] == 0
        made.commit(f"hatnet-{name} 0.1.0")
        made.git("tag", f"hatnet-{name}-v0.1.0")
    made.git("update-ref", "refs/remotes/origin/main", "HEAD")
    return made


@pytest.fixture
def repository(first_commit, tmp_path):
    """Both packages with a news fragment, never released."""
    return copied(first_commit, tmp_path)


@pytest.fixture
def released(first_release, tmp_path):
    """Both packages at 0.1.0, released and tagged, and origin/main where HEAD is."""
    return copied(first_release, tmp_path)


def copied(repository, folder):
    return Repository(shutil.copytree(repository.folder, folder / "checkout"))


@pytest.mark.parametrize(
    ("step", "version"),
    [("major", "1.0.0"), ("minor", "0.2.0"), ("patch", "0.1.1"), ("0.1.0", "0.1.0"), ("0.3.1", "0.3.1")],
)
def test_a_bump_writes_version_and_changelog_and_prints_the_tag(repository, step, version):
    status, said = repository.release("bump", "hatnet-train", step)
    assert (status, f"git tag -a hatnet-train-v{version} " in said) == (0, True)
    assert said.endswith(f"git push --atomic origin main hatnet-train-v{version}\n")
    assert repository.read("packages/hatnet-train/src/hatnet_train/__about__.py") == f'__version__ = "{version}"\n'
    changelog = repository.read("packages/hatnet-train/CHANGELOG.md")
    assert f"## {version} (" in changelog
    assert "### Added\n\n- What train is for,\n  on two lines.\n" in changelog
    assert not list(repository.folder.glob("packages/hatnet-train/changes/*.md"))
    assert "hatnet-core" not in repository.git("status", "--porcelain")


def test_sections_of_the_changelog_stand_latest_first(released):
    released.write("packages/hatnet-train/changes/+mended.fixed.md", "What was wrong.\n")
    released.commit()
    assert released.release("bump", "hatnet-train", "patch")[0] == 0
    changelog = released.read("packages/hatnet-train/CHANGELOG.md")
    assert changelog.index("# Changelog") < changelog.index("## 0.1.1 (") < changelog.index("## 0.1.0 (")
    assert changelog.index("### Fixed") < changelog.index("### Added")


@pytest.mark.parametrize(
    "step", ["0.0.9", "huge", "0.1", "v0.2.0", "0.2.0rc1", "0.2.0.dev1", "0.2.0.post1", "0.2.0+here", "1!0.2.0"]
)
def test_a_wrong_step_is_refused_in_one_line(repository, step):
    said = refused(repository, "bump", "hatnet-train", step)
    check(said, "hatnet-train", step, *(["0.1.0"] if step == "0.0.9" else ["major", "minor", "patch"]))
    assert len(said.splitlines()) == 1


def refused(repository, *arguments):
    """What is printed when nothing is written."""
    before = repository.content()
    status, said = repository.release(*arguments)
    assert status == 1
    assert repository.content() == before
    return said


def test_a_released_version_is_not_released_again(released):
    released.write("packages/hatnet-train/changes/+more.added.md", "More.\n")
    released.commit()
    check(refused(released, "bump", "hatnet-train", "0.1.0"), "CHANGELOG.md", "0.1.0")
    released.git("tag", "hatnet-train-v0.2.0")
    check(refused(released, "bump", "hatnet-train", "minor"), "tag", "hatnet-train-v0.2.0")


def test_a_package_without_news_is_not_released(released):
    check(refused(released, "bump", "hatnet-train", "minor"), "hatnet-train/changes", "fragment")


@pytest.mark.parametrize(
    "name", ["+odd.feature.md", "any-size.added.md", "+.added.md", "+a.added.txt", "+a.b.added.md"]
)
@pytest.mark.parametrize("command", [("bump", "hatnet-train", "minor"), ("changes",)], ids=["bump", "changes"])
def test_what_is_no_fragment_by_its_name_is_not_lost_but_refused(repository, command, name):
    repository.write(f"packages/hatnet-train/changes/{name}", "Something.\n")
    repository.commit()
    said = refused(repository, *command).splitlines()[-1]
    check(said, f"changes/{name}", "+WORDS.TYPE.md", "NUMBER.TYPE.md")


def test_an_empty_fragment_is_refused(repository):
    repository.write("packages/hatnet-train/changes/+empty.fixed.md", " \n\n")
    repository.commit()
    for command in (["changes"], ["bump", "hatnet-train", "minor"]):
        check(refused(repository, *command), "changes/+empty.fixed.md", "empty")


def test_a_fragment_may_be_named_after_an_issue(repository):
    repository.write("packages/hatnet-train/changes/12.fixed.md", "Mended.\n")
    repository.commit()
    assert repository.release("bump", "hatnet-train", "minor")[0] == 0
    assert "- Mended. (#12)" in repository.read("packages/hatnet-train/CHANGELOG.md")


def test_work_that_is_not_committed_is_not_released(repository):
    repository.write("packages/hatnet-train/src/hatnet_train/new.py", "")
    check(refused(repository, "bump", "hatnet-train", "minor"), "src/hatnet_train/new.py", "commit")
    # the range of hatnet-train would have to be staged with what is not committed there
    check(refused(repository, "bump", "hatnet-core", "minor"), "src/hatnet_train/new.py", "commit")
    assert repository.release("bump", "hatnet-core", "patch")[0] == 0


TRAIN = "packages/hatnet-train/pyproject.toml"
RANGE_NEWS = "packages/hatnet-train/changes/+hatnet-core-range.changed.md"


@pytest.mark.parametrize(
    ("step", "version", "range_"),
    [("minor", "0.2.0", ">=0.1,<0.3"), ("0.4.2", "0.4.2", ">=0.1,<0.5"), ("major", "1.0.0", ">=0.1,<2")],
)
def test_a_version_that_others_exclude_widens_their_range_in_the_same_commit(released, step, version, range_):
    add_fragment(released)
    released.commit()
    before = released.read(TRAIN)
    status, said = released.release("bump", "hatnet-core", step)
    assert status == 0
    check(said.splitlines()[-1], "hatnet-train")
    released.git("commit", "--quiet", "--message", f"hatnet-core {version}")  # of what is staged, no more
    assert released.git("status", "--porcelain") == ""
    assert released.read(TRAIN) == before.replace(">=0.1,<0.2", range_)
    assert released.release("changes", "HEAD~1")[0] == 0
    assert released.release("bump", "hatnet-train", "patch")[0] == 0
    changelog = released.read("packages/hatnet-train/CHANGELOG.md")
    assert f"### Changed\n\n- Works with hatnet-core {version.rpartition('.')[0]}.\n" in changelog


def test_a_version_that_others_admit_leaves_them_alone(released):
    add_fragment(released)
    released.commit()
    status, said = released.release("bump", "hatnet-core", "patch")
    assert (status, "hatnet-train" in said) == (0, False)
    assert "hatnet-train" not in released.git("status", "--porcelain")


def test_ranges_are_widened_in_extras_too_and_nothing_else_is(repository):
    text = """[project]
dependencies = [
    'hatnet-core >=0.1, <0.2 ; python_version < "3.12"',  # this one
    "torch>=2.6,<0.2",
]
[project.optional-dependencies]
more = ["hatnet-core[hub,timm]>=0.1.3,!=0.1.5,<0.2"]
all = ["hatnet-train[more]", "hatnet-core-like<0.2"]
"""
    repository.write(TRAIN, text)
    repository.commit()
    assert repository.release("bump", "hatnet-core", "minor")[0] == 0
    expected = text.replace(">=0.1, <0.2", ">=0.1, <0.3").replace("!=0.1.5,<0.2", "!=0.1.5,<0.3")
    assert repository.read(TRAIN) == expected


@pytest.mark.parametrize("range_", ["~=0.1.0", "==0.1.0", "<=0.1.9"])
def test_a_range_without_an_end_to_move_is_refused_and_writes_nothing(repository, range_):
    repository.write(TRAIN, f'[project]\ndependencies = ["hatnet-core{range_}"]\n')
    repository.commit()
    said = refused(repository, "bump", "hatnet-core", "minor")
    check(said, TRAIN, f"hatnet-core{range_}", ">=0.1.0,<0.3")


def test_a_range_that_cannot_be_staged_leaves_everything_as_it_was(repository):
    repository.write(".gitignore", "*-range.changed.md\n")
    repository.commit()
    assert refused(repository, "bump", "hatnet-core", "minor").startswith("git add -- ")
    assert not (repository.folder / RANGE_NEWS).exists()


def test_a_tag_that_is_no_release_is_passed_over(released, tmp_path):
    for tag in ("hatnet-core-v0.3-test", "hatnet-core-v0.2.0rc1", "hatnet-core-vnext"):
        released.git("tag", tag)
    add_fragment(released)
    released.commit()
    status, said = released.release("lowest", "hatnet-train", str(tmp_path / "out"))
    assert status == 0
    check(said.splitlines()[0], "hatnet-core-v0.1.0")
    assert released.release("bump", "hatnet-core", "minor")[0] == 0


def test_a_bump_that_fails_half_way_leaves_everything_as_it_was(repository):
    # git add refuses what is ignored: the changelog is written by then
    about = "packages/hatnet-train/src/hatnet_train/__about__.py"
    repository.git("rm", "--quiet", "--cached", about)
    repository.write(".gitignore", "__about__.py\n")
    repository.commit()
    assert refused(repository, "bump", "hatnet-train", "minor").startswith("git add -- ")


def touch(repository, name="core"):
    repository.write(f"packages/hatnet-{name}/src/hatnet_{name}/__init__.py", "changed = True\n")


def add_fragment(repository, name="core"):
    repository.write(f"packages/hatnet-{name}/changes/+second.fixed.md", "Mended.\n")


def test_on_a_branch_changed_sources_want_a_fragment_of_their_package(released):
    released.git("switch", "--quiet", "--create", "branch")
    touch(released)
    add_fragment(released, "train")
    released.commit()
    status, said = released.release("changes")
    assert (status, said.splitlines()[-1].strip()) == (1, "hatnet-core")
    add_fragment(released)
    released.commit()
    assert released.release("changes")[0] == 0


def test_a_fragment_that_was_there_before_does_not_count_for_a_branch(released):
    add_fragment(released)
    released.commit()
    released.git("update-ref", "refs/remotes/origin/main", "HEAD")
    released.git("switch", "--quiet", "--create", "branch")
    touch(released)
    released.commit()
    assert released.release("changes")[0] == 1


def test_tests_and_documents_want_no_fragment(released):
    released.git("switch", "--quiet", "--create", "branch")
    released.write("packages/hatnet-core/tests/test_it.py", "")
    released.write("packages/hatnet-core/README.md", "")
    released.commit()
    assert released.release("changes")[0] == 0


def test_what_main_took_since_the_branch_began_is_not_charged_to_it(released):
    released.git("branch", "branch")
    touch(released)
    add_fragment(released)
    released.commit()
    released.git("update-ref", "refs/remotes/origin/main", "HEAD")
    released.git("switch", "--quiet", "branch")
    released.write("packages/hatnet-train/tests/test_it.py", "")
    released.commit()
    assert released.release("changes")[0] == 0


def test_on_main_the_last_release_is_what_counts(released):
    touch(released)
    released.commit()
    released.git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert released.release("changes")[0] == 1
    add_fragment(released)
    released.commit()
    released.git("update-ref", "refs/remotes/origin/main", "HEAD")
    assert released.release("changes")[0] == 0


def test_the_commit_of_a_release_wants_no_fragment(released):
    touch(released)
    add_fragment(released)
    released.commit()
    before = released.git("rev-parse", "HEAD")
    assert released.release("bump", "hatnet-core", "patch")[0] == 0
    released.commit()
    assert released.release("changes", before)[0] == 0


def test_a_package_that_was_never_released_has_to_have_a_fragment(repository):
    assert repository.release("changes")[0] == 0
    repository.git("rm", "--quiet", "packages/hatnet-core/changes/+first.added.md")
    repository.commit()
    status, said = repository.release("changes")
    assert (status, said.splitlines()[-1].strip()) == (1, "hatnet-core")


def clone(repository, folder, *options):
    repository.git("clone", "--quiet", "--no-tags", *options, f"file://{repository.folder}", str(folder))
    return Repository(folder)


def test_a_clone_without_tags_reports_what_it_cannot_judge(released, tmp_path):
    touch(released)
    released.commit()
    copy = clone(released, tmp_path / "copy")
    status, said = copy.release("changes")
    assert status == 0
    check(said, "hatnet-core", "0.1.0")
    status, said = copy.release("changes", "HEAD~1")  # given a commit to compare with, it can
    assert (status, "0.1.0" in said) == (1, False)


def test_a_base_that_a_shallow_clone_lacks_is_an_error(released, tmp_path):
    touch(released)
    released.commit()
    base = released.git("rev-parse", "HEAD~1")
    copy = clone(released, tmp_path / "copy", "--depth=1")
    status, said = copy.release("changes", base)
    assert status == 1
    check(said, base, "clone")


@pytest.mark.parametrize("dropped", [False, True], ids=["zeros", "dropped"])
def test_a_push_that_follows_no_commit_is_judged_as_without_one(released, tmp_path, dropped):
    """A new branch names zeros, a forced push what a clone of the result lacks."""
    touch(released)
    released.commit()
    base = released.git("rev-parse", "HEAD") if dropped else 40 * "0"
    released.git("commit", "--quiet", "--amend", "--message", "Another")
    copy = Repository(tmp_path / "copy")
    released.git("clone", "--quiet", f"file://{released.folder}", str(copy.folder))
    status, said = copy.release("changes", base)
    assert (status, said.splitlines()[-1].strip()) == (1, "hatnet-core")  # since its release
    copy.git("switch", "--quiet", "--create", "branch")
    add_fragment(copy)
    copy.commit()
    status, said = copy.release("changes", base)
    assert status == 0
    check(said.splitlines()[0], base)


def test_a_tag_names_the_package_to_build(released):
    assert released.release("tagged", "hatnet-core-v0.1.0") == (0, "core\n")


@pytest.mark.parametrize(
    ("tag", "named"),
    [
        ("hatnet-core-v0.2.0", ["0.2.0", "__about__.py", "0.1.0"]),
        ("hatnet-cord-v0.1.0", ["PACKAGE-vVERSION", "hatnet-core"]),
        ("v0.1.0", ["PACKAGE-vVERSION", "hatnet-core"]),
        ("hatnet-core-v", ["PACKAGE-vVERSION", "hatnet-core"]),
    ],
)
def test_a_tag_that_does_not_agree_with_the_sources_is_refused(released, tag, named):
    status, said = released.release("tagged", tag)
    assert (status, len(said.splitlines())) == (1, 1)
    check(said, tag, *named)


def test_a_commit_that_main_lacks_is_not_released(released):
    released.git("switch", "--quiet", "--create", "branch")
    released.commit()
    head = released.git("rev-parse", "HEAD")[:12]
    status, said = released.release("tagged", "hatnet-core-v0.1.0")
    assert (status, len(said.splitlines())) == (1, 1)
    check(said, "hatnet-core-v0.1.0", head, "origin/main")
    released.git("update-ref", "refs/remotes/origin/main", "HEAD")
    released.git("switch", "--quiet", "--detach", "HEAD~1")  # main went on since
    assert released.release("tagged", "hatnet-core-v0.1.0") == (0, "core\n")
    released.git("update-ref", "-d", "refs/remotes/origin/main")
    check(released.release("tagged", "hatnet-core-v0.1.0")[1], "hatnet-core-v0.1.0", "origin/main")


def test_a_tag_without_a_section_of_the_changelog_is_refused(repository):
    status, said = repository.release("tagged", "hatnet-core-v0.1.0")
    assert status == 1
    check(said, "CHANGELOG.md", "0.1.0")


def test_the_lowest_core_is_that_of_the_lowest_tag_that_is_admitted(released, tmp_path):
    for _ in range(2):
        touch(released)
        add_fragment(released)
        released.commit()
        assert released.release("bump", "hatnet-core", "patch")[0] == 0
        released.commit()
        released.git("tag", f"hatnet-core-v{released.read(ABOUT).split(chr(34))[1]}")
    released.write("packages/hatnet-train/pyproject.toml", '[project]\ndependencies = ["hatnet-core>=0.1.1,<0.2"]\n')
    status, said = released.release("lowest", "hatnet-train", str(tmp_path / "out"))
    assert status == 0
    check(said.splitlines()[0], "hatnet-core-v0.1.1")
    assert (Path(said.splitlines()[-1]) / "src/hatnet_core/__about__.py").read_text() == '__version__ = "0.1.1"\n'


def test_while_nothing_is_released_the_lowest_core_is_that_of_the_workspace(repository, tmp_path):
    status, said = repository.release("lowest", "hatnet-train", str(tmp_path / "out"))
    assert (status, said.splitlines()[-1]) == (0, "packages/hatnet-core")
    check(said.splitlines()[0], "hatnet-core")


def test_a_released_core_whose_tags_are_missing_is_an_error(released, tmp_path):
    copy = clone(released, tmp_path / "copy")
    status, said = copy.release("lowest", "hatnet-train", str(tmp_path / "out"))
    assert status == 1
    check(said, "hatnet-core", "git fetch --tags")


def test_what_is_published_is_what_was_used():
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["build"]["steps"]
    lines = [line for step in steps for line in step.get("run", "").splitlines()]
    sessions = [line.removeprefix("nox --session ") for line in lines if line.startswith("nox ")]
    assert sessions == ['release -- "$GITHUB_REF_NAME"', '"wheels(${package#hatnet-})" -- dist']
    assert [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")] == ["dist/"]
