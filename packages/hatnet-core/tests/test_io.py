import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hatnet_core.io import atomic_write, json_object
from hatnet_testing import raises

WRITERS = {
    "bytes": lambda part, content: part.write_bytes(content),
    "text": lambda part, content: part.write_text(content.decode()),
    "library": lambda part, content: np.asarray(bytearray(content)).tofile(part),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_content_appears_under_the_name_at_the_end(write, tmp_path):
    path = tmp_path / "a.json"
    for content in (b"old", b"new"):
        with atomic_write(path) as part:
            before = path.read_bytes() if path.exists() else None
            write(part, content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(error, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"old")

    def write():
        with atomic_write(path) as part:
            part.write_bytes(b"ne")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from hatnet_core.io import atomic_write
with atomic_write(sys.argv[1]) as part, part.open("wb") as file:
    file.write(b"x" * 100_000)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_write_that_is_killed_half_way_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    result = subprocess.run([sys.executable, "-c", KILLED, path])
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.name.startswith(".a.bin.")
    assert left.stat().st_size == 100_000
    with atomic_write(path) as part:  # what was left does not hinder the next write
        part.write_bytes(b"new")
    assert path.read_bytes() == b"new"


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(stat.S_ISDIR(os.fstat(fd).st_mode)), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("rename"), replace(self, target))[1])
    with atomic_write(tmp_path / "a") as part:
        part.write_bytes(b"new")
    assert events == [False, "rename", True]


def test_a_file_is_as_readable_as_any_other(tmp_path):
    with atomic_write(tmp_path / "a") as part:
        part.write_bytes(b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_missing_folder_is_reported_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "nowhere" / "a"):
        raise AssertionError("the block ran")


def test_a_folder_of_that_name_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with raises(OSError, tmp_path / "a"), atomic_write(tmp_path / "a") as part:
        part.write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_two_writers_at_once_leave_the_later_one_whole(tmp_path):
    with atomic_write(tmp_path / "a") as first, atomic_write(tmp_path / "a") as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert (tmp_path / "a").read_bytes() == b"first"  # renamed last


def test_the_suffix_is_kept_for_libraries_that_choose_the_format_by_it(tmp_path):
    with atomic_write(tmp_path / "a.png") as part:
        assert part.suffix == ".png"
        part.write_bytes(b"")


@pytest.mark.parametrize(
    ("content", "named"), [("{", "JSON"), (b"\xff\xfe", "JSON"), ("[" * 100_000, "JSON"), ("[1]", "list"), (1, "int")]
)
def test_json_that_is_not_an_object_is_refused_by_its_origin(content, named):
    with raises(ValueError, "a/config.json", named):
        json_object(content, "a/config.json")


def test_json_comes_from_strings_bytes_and_parsed_values():
    for content in ('{"a": [1]}', b'{"a": [1]}', {"a": [1]}):
        assert json_object(content, "x") == {"a": [1]}
