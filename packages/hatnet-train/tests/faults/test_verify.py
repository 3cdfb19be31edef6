"""hatnet-train --verify: what is usable of a run folder."""

import shutil

import pytest

from hatnet_testing import check, error_line
from hatnet_train.run.checkpoint import committed, read_manifest
from hatnet_train.run.folder import check_run
from launches import lines_naming


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


def verdict(log, path):
    """Return the line that ``--verify`` prints about a checkpoint or a run folder."""
    (line,) = [line for line in log.splitlines() if line.startswith(f"{path}: ")]
    return line.removeprefix(f"{path}: ")


def test_a_run_as_it_was_written_is_usable(train, run):
    log = train("--verify", run, ranks=1)
    old, new = reversed(committed(run / "checkpoints"))
    assert verdict(log, old) == verdict(log, new) == verdict(log, run)
    assert lines_naming(log, "--resume", new)


@pytest.mark.parametrize("damage", [flip, shorten, remove])
def test_every_file_is_compared_with_its_manifest(damage, run):
    new = committed(run / "checkpoints")[0]
    listed = [folder / name for folder in (new, run) for name in read_manifest(folder).files]
    assert {path.name for path in listed} == {
        *("model.safetensors", "model_ema.safetensors", "optimizer.safetensors", "state.json"),
        *("best.safetensors", "metrics.jsonl"),
    }
    for path in listed:
        before = path.read_bytes()
        damage(path)
        found = check_run(run)
        (problem,) = found.pop(path.parent)
        check(problem, path)
        assert not any(found.values())
        path.write_bytes(before)


def test_damaged_files_are_named_and_the_checkpoint_to_resume_from(train, run):
    old, new = reversed(committed(run / "checkpoints"))
    flip(new / "optimizer.safetensors")
    log = train("--verify", run, ranks=1, expected=1)
    assert verdict(log, old) == verdict(log, run) != verdict(log, new)
    assert lines_naming(log, new / "optimizer.safetensors")
    assert lines_naming(log, "--resume", old)
    error_line(log, "hatnet-train verify", 1, 3, new)


def test_a_folder_that_is_not_of_a_run_is_refused(train, tmp_path):
    log = train("--verify", tmp_path, ranks=1, expected=1)
    error_line(log, "hatnet-train verify", tmp_path, "config.json")
