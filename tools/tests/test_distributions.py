"""The check of distributions, on a package that is made here with one thing wrong at a time."""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from hatnet_testing import check

ROOT = Path(__file__).parents[2]
NAME = "hatnet-core"
PYPROJECT = '[project]\nname = "hatnet-core"\nlicense = "Apache-2.0"\n'
METADATA = "Metadata-Version: 2.4\nName: hatnet-core\nLicense-Expression: Apache-2.0\nLicense-File: LICENSE\n\nText\n"
INFO = "hatnet_core-0.1.0.dist-info"


def checkout(folder):
    """A checkout of a small hatnet-core, and what its wheel and its sdist have to hold."""
    sources = {"src/hatnet_core/__init__.py": "x = 1\n", "src/hatnet_core/py.typed": "", "pyproject.toml": PYPROJECT}
    for name, text in {**sources, "LICENSE": "A licence.\n", "changes/+new.added.md": "New.\n"}.items():
        path = folder / "packages" / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    wheel = {name.removeprefix("src/"): text for name, text in sources.items() if name.startswith("src/")}
    wheel |= {f"{INFO}/{name}": "" for name in ("WHEEL", "RECORD")}
    wheel |= {f"{INFO}/METADATA": METADATA, f"{INFO}/licenses/LICENSE": "A licence.\n"}
    return wheel, {**sources, "LICENSE": "A licence.\n", "PKG-INFO": METADATA, ".gitignore": ""}


def write(folder, wheel, sdist, again=None):
    for origin, files in (("from-sdist", wheel), ("from-checkout", again or wheel)):
        (folder / "dist" / origin).mkdir(parents=True)
        with zipfile.ZipFile(folder / "dist" / origin / "hatnet_core-0.1.0-py3-none-any.whl", "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    with tarfile.open(folder / "dist/from-sdist/hatnet_core-0.1.0.tar.gz", "w:gz") as archive:
        for name, text in sdist.items():
            member = tarfile.TarInfo(f"hatnet_core-0.1.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def checked(folder):
    command = [sys.executable, ROOT / "tools/distributions.py", "files", NAME, "dist"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stdout + result.stderr


def test_distributions_that_hold_what_they_should_pass(tmp_path):
    wheel, sdist = checkout(tmp_path)
    write(tmp_path, wheel, sdist)
    status, said = checked(tmp_path)
    assert status == 0
    check(said, "hatnet_core-0.1.0", 6)


@pytest.mark.parametrize(
    ("in_wheel", "in_sdist", "named"),
    [
        ({"tests/data/big.bin": "0"}, {}, ["wheel", "tests/data/big.bin"]),
        ({"hatnet_core/__pycache__/a.pyc": "0"}, {}, ["wheel", "hatnet_core/__pycache__/a.pyc"]),
        ({"hatnet_core/py.typed": None}, {}, ["wheel", "hatnet_core/py.typed"]),
        ({f"{INFO}/licenses/LICENSE": None}, {}, ["wheel", f"{INFO}/licenses/LICENSE"]),
        ({f"{INFO}/METADATA": METADATA.replace("Apache-2.0", "MIT")}, {}, ["License-Expression", "'MIT'"]),
        ({}, {"src/hatnet_core/__init__.py": None}, ["sdist", "src/hatnet_core/__init__.py"]),
        ({}, {"runs/model.bin": "0"}, ["sdist", "runs/model.bin"]),
        ({}, {"changes/+new.added.md": "New.\n"}, ["sdist", "changes/+new.added.md"]),
        ({"../hatnet_core/a.py": ""}, {}, ["../hatnet_core/a.py"]),
    ],
)
def test_a_file_too_many_or_too_few_is_named(tmp_path, in_wheel, in_sdist, named):
    wheel, sdist = checkout(tmp_path)
    changed = [
        {name: text for name, text in (files | changes).items() if text is not None}
        for files, changes in ((wheel, in_wheel), (sdist, in_sdist))
    ]
    write(tmp_path, *changed)
    status, said = checked(tmp_path)
    assert (status, len(said.splitlines())) == (1, 1)
    check(said, *named)


def test_the_path_of_the_checkout_is_found_in_any_file(tmp_path):
    wheel, sdist = checkout(tmp_path)
    write(tmp_path, wheel, sdist | {"PKG-INFO": f"built in {tmp_path}"})
    status, said = checked(tmp_path)
    assert status == 1
    check(said, "PKG-INFO", "sdist", "hatnet-core")


def test_a_wheel_that_depends_on_where_it_is_built_from_is_refused(tmp_path):
    wheel, sdist = checkout(tmp_path)
    write(tmp_path, wheel, sdist, again=wheel | {"hatnet_core/__init__.py": "x = 2\n"})
    status, said = checked(tmp_path)
    assert status == 1
    check(said, "hatnet_core/__init__.py")
