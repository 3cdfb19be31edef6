"""Checkpoints on disk: in which order they are written, and which of them stay."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from hatnet_testing import raises
from hatnet_train.run.checkpoint import (
    DAMAGED,
    MANIFEST,
    DamagedError,
    check,
    commit,
    committed,
    folder_name,
    read,
    read_manifest,
    set_aside,
    tidy,
)


def save(folder, step, top1=None, keep=2):
    """A checkpoint of one file, after which the others are tidied."""
    about = {} if top1 is None else {"top1": top1}
    files = {"weights": lambda path: path.write_bytes(bytes(100) + step.to_bytes(2, "big"))}
    written = commit(folder, folder_name(step, evaluated=top1 is not None), files, about)
    tidy(folder, keep, written)


def steps(folder):
    return [int(path.name.split("-")[1]) for path in committed(folder)]


def flip(path):
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)


def test_the_newest_and_the_best_stay(tmp_path):
    for step, top1 in ((1, 10.0), (2, 50.0), (3, 40.0), (4, 50.0), (5, 20.0), (6, 30.0)):
        save(tmp_path, step, top1)
    assert steps(tmp_path) == [6, 5, 4]  # of equal ones the newer
    save(tmp_path, 7, None, keep=1)
    assert steps(tmp_path) == [7, 4]
    assert [problem for folder in committed(tmp_path) for problem in check(folder)] == []


def test_no_checkpoint_goes_in_favour_of_a_damaged_one(tmp_path):
    for step in (3, 6, 9):
        save(tmp_path, step, 10.0 * step)
    flip(tmp_path / folder_name(9, evaluated=True) / "weights")
    with raises(DamagedError, tmp_path / folder_name(9, evaluated=True) / "weights"):
        list(read(tmp_path / folder_name(9, evaluated=True)))
    set_aside(tmp_path, tmp_path / folder_name(6, evaluated=True))
    save(tmp_path, 7, keep=1)
    assert steps(tmp_path) == [7, 6]
    assert len([p for p in tmp_path.iterdir() if p.name.startswith(f"{DAMAGED}step-0000000009")]) == 1


def test_a_checkpoint_is_opened_once_per_file_and_every_problem_is_named(tmp_path):
    files = {name: lambda path: path.write_bytes(path.name.encode()) for name in ("one", "two", "three")}
    folder = commit(tmp_path, folder_name(1, evaluated=False), files, {})
    opened = []
    listening = True

    def note(event, arguments):  # an audit hook cannot be removed
        if listening and event == "open" and str(arguments[0]).startswith(str(folder)):
            opened.append(Path(arguments[0]).name)

    sys.addaudithook(note)
    assert dict(read(folder)) == {name: name.encode() for name in files}
    listening = False
    assert sorted(opened) == sorted([MANIFEST, *files])
    (folder / "one").write_bytes(b"eno")
    (folder / "three").unlink()
    found = {}
    with raises(DamagedError, folder / "one", folder / "three") as caught:
        found.update(read(folder))
    assert found == {}
    assert len(caught.value.problems) == 2


def test_what_was_written_just_now_stays_whatever_stands_beside_it(tmp_path):
    for step in (6, 9):
        save(tmp_path, step, keep=1)
    save(tmp_path, 7, keep=1)
    assert 7 in steps(tmp_path)


def test_all_files_reach_the_disk_before_the_folder_gets_its_name_and_the_name_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor):
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        events.append(("sync", re.sub(r"\.[0-9a-f]{8}\.tmp", ".tmp", name)))
        fsync(descriptor)

    def note_rename(self, target):
        events.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    folder = tmp_path / "checkpoints"
    name = folder_name(1, evaluated=False)
    commit(folder, name, dict.fromkeys(["a", "b"], lambda path: path.write_text("x")), {})
    assert events == [
        ("sync", tmp_path.name),
        *[("sync", "a"), ("sync", "b"), ("sync", f".{MANIFEST}.tmp.json"), ("sync", f".staging-{name}")],
        ("rename", name),
        ("sync", "checkpoints"),
    ]


def test_a_manifest_that_lists_nothing_is_none(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"version": 1, "files": {}}))
    with raises(ValueError, tmp_path / MANIFEST, "files"):
        read_manifest(tmp_path)


ENTRY = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([], ["version", None, 1]),
        ({}, ["version", None, 1]),
        ({"version": 2, "entries": []}, ["version", 2, 1]),
        ({"version": 1}, ["files"]),
        ({"version": 1, "files": {"a": 7}}, ['files["a"]', 7]),
        ({"version": 1, "files": {"a": ENTRY, "b": {**ENTRY, "bytes": -1}}}, ['files["b"].bytes', -1]),
        ({"version": 1, "files": {"a": ENTRY, "b": {"bytes": 1}}}, ['files["b"].sha256']),
        ({"version": 1, "files": {"a": {**ENTRY, "sha256": "0" * 63 + "G"}}}, ['files["a"].sha256']),
    ],
)
def test_a_wrong_value_of_a_manifest_is_named_with_file_and_field(content, named, tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with raises(ValueError, tmp_path / MANIFEST, *named):
        read_manifest(tmp_path)


def test_further_keys_of_a_manifest_are_ignored(tmp_path):
    files = {"a": {**ENTRY, "mode": 0o644}}
    (tmp_path / MANIFEST).write_text(json.dumps({"version": 1, "step": 3, "top1": 5, "files": files}))
    assert read_manifest(tmp_path).top1 == 5
    assert read_manifest(tmp_path).files["a"].bytes == 1
