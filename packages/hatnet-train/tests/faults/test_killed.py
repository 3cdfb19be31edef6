"""kill -9 at any moment: what was saved loads, and the run that goes on gives what the whole one would have."""

import random
import shutil
import signal
import time

import faulty
import pytest
from runs import assert_all_whole, assert_same_bits, newest, steps

from hatnet_train.run.checkpoint import STAGING, check
from launches import lines_naming, until

SECONDS = 12.0
"""Longest time from the start of the processes to a kill; the run of the tests takes about as long."""


def test_a_process_that_is_killed_at_any_point_of_a_save_leaves_a_whole_checkpoint(launch, tmp_path):
    killed, found = 0, []
    while True:
        folder = tmp_path / str(killed)
        folder.mkdir()
        faulty.save(folder, 1)
        with launch([folder, killed + 1], ranks=1, module="faulty", function="die_while_saving") as process:
            (status,) = process.wait(30)
        whole, problems = newest(folder)
        assert problems == []
        found.append(whole.name)
        assert (whole / "one").stat().st_size == 5000 + int(whole.name[-1])
        faulty.save(folder, 3)  # whatever was left is not in the way, and goes
        assert [p.name for p in folder.iterdir()] == ["step-0000000003"]
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
    assert killed > 15
    assert found == sorted(found)  # the old one up to a point, the new one from there on
    assert set(found) == {"step-0000000001", "step-0000000002"}


def saving(out):
    """Return whether a checkpoint is being written."""
    return any(p.name.startswith(STAGING) for p in (out / "checkpoints").glob(".*"))


def wait_for_a_save(started, out):
    """Until a save begins, or the run is at its end."""
    until(lambda: saving(out) or started.poll(0) is not None, 120, started.text)


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    kills, whole, launch, train, everything, tmp_path, record_property
):
    """Every other kill comes at a random time, the others soon after a save began, the first of them at once."""
    draw = random.Random(kills)
    count = midst = runs = 0
    out = tmp_path / "0"
    while count < kills:
        command = [*everything, "--zero-stage", "1", "--checkpoint-steps", "1", "--out", out, "--resume", "auto"]
        with launch(command) as started:
            if count % 2:
                wait_for_a_save(started, out)
                time.sleep(draw.uniform(0, 1) if midst else 0)
            else:
                time.sleep(draw.uniform(0, SECONDS))
            if all(started.poll(rank) is None for rank in (0, 1)):
                midst += saving(out)
                started.send(draw.randrange(2), signal.SIGKILL, to_all=draw.random() < 0.5)
                time.sleep(draw.uniform(0, 0.5))  # for the other one to make what it can of it
                count += 1
            else:
                assert started.wait(60) == [0, 0], started.text()
                assert_same_bits(out, whole(1))
                runs += 1
                out = tmp_path / str(runs)
        if steps(out):
            assert_all_whole(out)
    train(*everything, "--zero-stage", "1", "--out", out, "--resume", "auto")
    assert_same_bits(out, whole(1))
    assert midst > 0
    record_property("of them in the middle of a save", midst)
    record_property("runs that ended, bit for bit alike", runs + 1)


def test_a_checkpoint_that_is_damaged_is_passed_over_for_the_one_before(whole, train, everything, tmp_path):
    """As a disk may leave it; of the two that are kept, the older one serves."""
    run = tmp_path / "run"
    shutil.copytree(whole(1), run)
    newest_one, _ = newest(run / "checkpoints")
    with (newest_one / "optimizer.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xfe")
    (problem,) = check(newest_one)
    log = train(*everything, "--zero-stage", "1", "--out", run, "--resume", "auto")
    assert lines_naming(log, "warning", problem)
    assert lines_naming(log, "hatnet-train: ", "step 6", run / "checkpoints" / "step-0000000006")
    assert_same_bits(run, whole(1))
    assert_all_whole(run)
