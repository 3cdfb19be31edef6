"""A process that is gone or hangs: the others end, in the time that was promised, and name it."""

import signal
import time

import pytest
from runs import assert_same_bits, steps

from hatnet_testing import error_line
from hatnet_train.distributed.heartbeat import PATIENCE_SECONDS, SILENT_SECONDS
from launches import lines_naming, until

SILENT = f"{SILENT_SECONDS:g} s"
"""How long a process that is gone has given no sign."""


@pytest.mark.parametrize(
    ("gone", "number", "named"),
    [
        (1, signal.SIGKILL, ["rank 1 on", SILENT]),
        pytest.param(0, signal.SIGKILL, ["rank 0", "127.0.0.1"], marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, ["rank 1 on", SILENT], marks=pytest.mark.slow),
    ],
)
def test_the_other_processes_end_and_name_the_one_that_is_gone_or_hangs(
    gone, number, named, launch, train, everything, whole, tmp_path, record_property
):
    out, timeout = tmp_path / "run", 10
    command = [*everything, "--zero-stage", "1", "--out", out, "--timeout", timeout, "--checkpoint-steps", "2"]
    with launch(command) as started:
        until(lambda: max(steps(out), default=0) >= 2, 120, started.text)
        started.send(gone, number)
        begin = time.monotonic()
        until(lambda: started.poll(1 - gone) is not None, timeout + 3 * SILENT_SECONDS + 15, started.text)
        took = time.monotonic() - begin
        assert started.poll(1 - gone) == 1
        error_line(started.log(1 - gone), "hatnet-train", *named, "--resume")
        assert "Traceback" not in started.log(1 - gone)
    record_property("the other process ended after seconds", round(took))
    if (gone, number) != (1, signal.SIGKILL):  # that is among the kills of test_killed
        train(*everything, "--zero-stage", "1", "--out", out, "--resume", "auto")
        assert_same_bits(out, whole(1))


@pytest.mark.slow
@pytest.mark.parametrize(("gone", "function"), [(0, "hang"), (1, "hang_first")])
def test_a_process_whose_communication_does_not_fail_ends_all_the_same(gone, function, launch, everything, tmp_path):
    """As NCCL may wait for ever: here, the process that is left does not communicate."""
    out = tmp_path / "run"
    command = [*everything, "--out", out, "--checkpoint-steps", "4"]
    with launch(command, module="faulty", function=function) as started:
        until(lambda: steps(out)[:1] == [4], 120, started.text)
        time.sleep(3)  # for both to hear that it is saved
        started.send(gone, signal.SIGKILL)
        until(lambda: started.poll(1 - gone) is not None, PATIENCE_SECONDS + 2 * SILENT_SECONDS + 20, started.text)
        assert started.poll(1 - gone) == 1
        named = ["rank 0", "127.0.0.1"] if gone == 0 else ["rank 1 on", SILENT]
        error_line(started.log(1 - gone), "hatnet-train", f"{PATIENCE_SECONDS:g} s", *named)


@pytest.mark.slow
def test_a_process_that_lives_but_makes_no_step_is_named(launch, everything, tmp_path):
    out = tmp_path / "run"
    command = [*everything, "--out", out, "--timeout", "12"]
    with launch(command, module="faulty", function="hang") as started:
        until(lambda: started.poll(0) is not None, 120, started.text)
        (error,) = lines_naming(started.log(0), "hatnet-train: error: ", "12 s", "rank 1 on ")
        assert SILENT not in error  # all processes live
        assert started.wait(60) == [1, 1]
