"""hatnet-train --verify: what is usable of a run folder."""

import shutil

import pytest

from hatnet_train.checkpoint import committed, read_manifest
from hatnet_train.verify import check_run


@pytest.fixture
def run(whole, tmp_path):
    """A copy of a finished run, which a test may damage."""
    copy = tmp_path / "run"
    shutil.copytree(whole(1), copy)
    return copy


def flip(path):
    """Another bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path):
    """A byte less."""
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    """Not there."""
    path.unlink()


def test_a_run_as_it_was_written_is_usable(train, run):
    said = train("--verify", run, ranks=1)
    old, new = reversed(committed(run / "checkpoints"))
    assert said.splitlines()[1:] == [
        f"{old}: usable",
        f"{new}: usable",
        f"{run}: usable",
        f"--resume auto goes on from {new}",
    ]


@pytest.mark.parametrize("damage", [flip, shorten, remove])
def test_every_file_is_compared_with_its_manifest(damage, run):
    new = committed(run / "checkpoints")[0]
    listed = [folder / name for folder in (new, run) for name in read_manifest(folder).files]
    assert {path.name for path in listed} == {
        *("model.safetensors", "model_ema.safetensors", "optimizer.safetensors", "state.json", "metrics.jsonl")
    }
    for path in listed:
        before = path.read_bytes()
        damage(path)
        found = check_run(run)
        (problem,) = found.pop(path.parent)
        assert problem.startswith(f"{path} ")
        assert not any(found.values())
        path.write_bytes(before)


def test_what_is_damaged_is_told_and_what_is_left_to_go_on_from(train, run):
    old, new = reversed(committed(run / "checkpoints"))
    flip(new / "optimizer.safetensors")
    said = train("--verify", run, ranks=1, expected=1)
    assert f"{old}: usable\n{new}: damaged\n  {new / 'optimizer.safetensors'} has other content than " in said
    assert f"--resume auto goes on from {old}" in said
    assert f"hatnet-train: error: 1 of 3 are damaged: {new}" in said


def test_what_is_no_run_folder_is_said(train, tmp_path):
    said = train("--verify", tmp_path, ranks=1, expected=1)
    assert f"hatnet-train: error: neither config.json nor checkpoints in {tmp_path}; expected a run folder" in said
