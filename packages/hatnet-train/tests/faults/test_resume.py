"""A run that was interrupted goes on bit for bit, or on other processes nearly so; else it says why not."""

import json
import shutil
import signal
import stat
import time

import pytest
from runs import assert_same_bits, distance, rows, steps

from hatnet_testing import check, error_line
from hatnet_train.run.checkpoint import committed
from launches import lines_naming, until


@pytest.fixture
def interrupted(launch, everything, tmp_path):
    """Starts a run and sends one of its ranks a signal in the middle of the second epoch; its folder."""

    def start(*flags, number=signal.SIGTERM, ranks=2, name="run", **kwargs):
        out = tmp_path / name
        with launch([*everything, "--checkpoint-steps", "4", *flags, "--out", out], ranks=ranks, **kwargs) as started:
            until(lambda: max(steps(out), default=0) >= 4, 120, started.text)
            started.send(ranks - 1, number)
            assert started.wait(60) == [75] * ranks, started.text()
            assert lines_naming(started.log(0), "hatnet-train: ", f"step {steps(out)[0]} ", "--resume auto")
        assert 4 < steps(out)[0] < 9
        assert not (out / "model.safetensors").exists()
        return out

    return start


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        pytest.param(0, signal.SIGTERM, marks=pytest.mark.slow),
        (1, signal.SIGUSR1),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(3, signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_asked_to_end_goes_on_bit_for_bit_at_every_zero_stage(
    stage, number, interrupted, whole, train, everything
):
    out = interrupted("--zero-stage", stage, number=number)
    step = steps(out)[0]
    log = train(*everything, "--zero-stage", stage, "--out", out, "--resume", "auto")
    assert lines_naming(log, "hatnet-train: ", f"step {step}", f"step-{step:010d}")
    assert_same_bits(out, whole(stage))
    record = json.loads((out / "config.json").read_text())
    assert len(record["resumed"]) == 1
    assert record["resumed"][0]["config"]["checkpoint_steps"] == 0


@pytest.mark.slow
def test_a_run_in_bf16_goes_on_bit_for_bit(interrupted, train, everything, tmp_path):
    flags = ["--precision", "bf16", "--zero-stage", "2"]
    out = interrupted(*flags)
    train(*everything, *flags, "--out", out, "--resume", "auto")
    train(*everything, *flags, "--out", tmp_path / "whole")
    assert_same_bits(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_folder_that_a_run_is_writing_to_is_refused(launch, train, everything, tmp_path):
    out = tmp_path / "run"
    with launch([*everything, "--out", out], ranks=1) as started:
        until((out / "config.json").exists, 120, started.text)
        log = train(*everything, "--out", out, "--resume", "auto", ranks=1, expected=1)
        assert "--" not in error_line(log, "hatnet-train", out)  # no option helps
        assert started.wait() == [0], started.text()


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes_and_zero_stage(
    ranks, stage, train, everything, still, tmp_path
):
    """Without dropout and stochastic depth, whose draws are those of a process."""
    moved = tmp_path / "moved"
    log = train(
        *[*everything, "--drop-rate", "0", "--drop-path-rate", "0"],
        *["--zero-stage", stage, "--out", moved, "--resume", still / "checkpoints" / "step-0000000005"],
        ranks=ranks,
    )
    assert lines_naming(log, "hatnet-train: ", "step 5", "step-0000000005")
    assert distance(moved, still) < 1e-3
    for ours, theirs in zip(rows(moved), rows(still), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert ours["lr"] == theirs["lr"]


@pytest.mark.slow
def test_what_a_run_cannot_resume_with_is_refused_with_the_reason(train, everything, still, tmp_path):
    def refused(*arguments, named, ranks=1):
        log = train(*everything, "--drop-rate", "0", "--drop-path-rate", "0", *arguments, ranks=ranks, expected=1)
        check(lines_naming(log, "hatnet-train: error: ")[0], *named)
        assert "Traceback" not in log

    new, older = ["--out", tmp_path / "run"], still / "checkpoints" / "step-0000000005"
    for other, named, ranks in (
        (["--lr", "1e-3"], [older, "--lr", "0.0003", "0.001"], 1),
        ([], ["--batch-size", "accumulation", 20, 5, 24], 5),
        (["--data", "digits"], [older, "training data", "72 images"], 1),
        (["--resume", tmp_path], [tmp_path], 1),
    ):
        refused(*new, "--resume", older, *other, named=named, ranks=ranks)
        assert not (tmp_path / "run").exists()
    refused("--out", still, "--resume", older, named=[older, still, "step-0000000009-evaluated", "--out", "--resume"])
    bare = shutil.copytree(still, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    auto = ["--out", bare, "--resume", "auto"]
    refused(*auto, named=[bare, "checkpoints", "--out"])
    (bare / "manifest.json").unlink()
    refused(*auto, "--lr", "1", named=[bare, "--lr", "0.0003", "1.0"])


@pytest.mark.slow
def test_a_signal_during_the_evaluation_saves_what_was_trained(launch, train, everything, images, tmp_path):
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "train").symlink_to(images / "train")
    for image in (images / "val").glob("*/*"):
        folder = tmp_path / "many" / "val" / image.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(200):
            (folder / f"{number}-{image.name}").hardlink_to(image)
    command = [*everything, "--data", tmp_path / "many", "--epochs", "1", "--checkpoint-steps", "2"]
    out = tmp_path / "run"
    with launch([*command, "--out", out], module="faulty", function="show_evaluation") as started:
        until((out / "evaluating").exists, 120, started.text)
        started.send(0, signal.SIGTERM, to_all=True)
        assert started.wait(60) == [75, 75], started.text()
    assert next(folder.name for folder in committed(out / "checkpoints")) == "step-0000000003"
    assert rows(out) == []
    train(*command, "--out", out, "--resume", "auto")
    train(*command, "--out", tmp_path / "whole")
    assert_same_bits(out, tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_cannot_save_in_time_ends_all_the_same(launch, everything, tmp_path):
    out = tmp_path / "run"
    with launch([*everything, "--out", out, "--preempt-seconds", "0.01", "--checkpoint-steps", "2"]) as started:
        until(lambda: max(steps(out), default=0) >= 2, 120, started.text)
        for rank in (0, 1):
            started.send(rank, signal.SIGTERM)
        assert started.wait(60) == [75, 75], started.text()
        assert lines_naming(started.text(), "hatnet-train: error: ", "0.01 s", "--preempt-seconds", "--resume auto")
    assert steps(out)[0] >= 2


@pytest.mark.slow
def test_a_process_that_waits_for_a_hanging_one_ends_in_that_time_too(launch, everything, tmp_path):
    """While a process waits in torch, Python runs no handlers."""
    out = tmp_path / "run"
    command = [*everything, "--out", out, "--preempt-seconds", "2", "--checkpoint-steps", "2"]
    with launch(command, module="faulty", function="hang") as started:
        until(lambda: max(steps(out), default=0) >= 4, 120, started.text)
        time.sleep(1)
        started.send(0, signal.SIGTERM)
        begin = time.monotonic()
        until(lambda: started.poll(0) is not None, 30, started.text)
        assert time.monotonic() - begin < 5
        assert started.poll(0) == 75
        error_line(started.log(0), "hatnet-train", "2 s", "--preempt-seconds", "--resume auto")


def test_nothing_of_a_run_is_for_everybody_to_change(whole):
    """The run was started where new files are."""
    found = [p for p in whole(1).rglob("*") if not p.is_symlink()]
    assert len(found) > 10
    assert [p for p in found if p.stat().st_mode & stat.S_IWOTH] == []
