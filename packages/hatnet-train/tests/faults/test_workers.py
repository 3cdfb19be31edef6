"""Data workers that fail in any way: the command ends with status 1, says why in one line, and leaves none behind."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from hatnet_core import create_model, save_checkpoint
from hatnet_testing import error_line
from hatnet_train.data.augment import MEAN, STD
from launches import Launch, Warm, until

NAMES = {"train": "hatnet-train", "evaluate": "hatnet-eval"}

SECONDS = 30.0
"""Longest time from a failure to the end of the command: three times what is promised, on a busy machine."""


@pytest.fixture(scope="module")
def commands(images, tmp_path_factory):
    """Arguments of the commands that read the images with data workers."""
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    record = {"classes": [f"class{i}" for i in range(3)], "image_size": 64, "crop_fraction": 1.0}
    save_checkpoint(create_model("hatnet_tiny", num_classes=3), checkpoint, record | {"mean": MEAN, "std": STD})

    def of(name, folder):
        if name == "evaluate":
            return ["--checkpoint", checkpoint, "--data", images, "--size", "256", "--batch", "4", "--workers", "2"]
        run = ["--recipe", "digits", "--data", images, "--image-size", "64", "--epochs", "1", "--batch-size", "24"]
        return [*run, "--workers", "2", "--out", folder / "run"]

    return of


def ended(started):
    """Wait for the end of the only process, and be sure that it is that of its workers, too."""
    begin = time.monotonic()
    until(lambda: started.poll(0) is not None, SECONDS, started.text)
    for pid in started.pids:
        with pytest.raises(ProcessLookupError):
            os.killpg(pid, 0)
    assert time.monotonic() - begin < SECONDS
    return started.poll(0), started.log(0).replace("\0", "")  # torch ends its report of a bus error with one


@pytest.mark.parametrize(
    ("command", "fault", "named"),
    [
        ("train", "memory", ("MemoryError", "--batch-size", "--workers")),
        pytest.param("evaluate", "memory", ("MemoryError", "--batch", "--workers"), marks=pytest.mark.slow),
        ("evaluate", "odd", ("OddError", "odd error")),
        ("train", "killed", ("killed", "--workers")),
        ("evaluate", "exit", ("killed", "--workers")),
        ("evaluate", "bus error", ("/dev/shm", "--shm-size", "--workers")),
    ],
)
def test_a_worker_that_fails_ends_the_command(command, fault, named, launch, commands, tmp_path):
    arguments = [command, fault, tmp_path / "mark", *commands(command, tmp_path)]
    with launch(arguments, ranks=1, module="faulty", function="failing_images") as started:
        until((tmp_path / "mark").exists, 120, started.text)
        status, log = ended(started)
    assert status == 1
    error_line(log, NAMES[command], *named)
    assert ("Traceback" in log) == (fault == "odd")


def test_the_trace_of_an_unexpected_error_leads_into_the_worker(launch, commands, tmp_path):
    arguments = ["train", "odd", tmp_path / "mark", *commands("train", tmp_path)]
    with launch(arguments, ranks=1, module="faulty", function="failing_images") as started:
        assert started.wait() == [1]
        assert "in image\n" in started.log(0)
        assert " in load\n" not in started.log(0)


@pytest.fixture(scope="module")
def secluded():
    """A process with mounts of its own, among them a /dev/shm of 256 KB."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let its users mount file systems in a namespace")
    process = Warm("unshare", "-rm")
    yield process
    process.end()


@pytest.mark.parametrize("command", ["train", pytest.param("evaluate", marks=pytest.mark.slow)])
def test_a_small_dev_shm_is_named_with_its_size_and_remedies(command, secluded, commands, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "/dev/shm"]
    with Launch(secluded, tmp_path, 1, mount, module="faulty", function="command") as process:
        assert process.wait(30) == [0], process.text()
    with Launch(secluded, tmp_path, 1, commands(command, tmp_path), function=command) as started:
        until(lambda: ": error: " in started.log(0) or started.poll(0) is not None, 120, started.text)
        status, log = ended(started)
    assert status == 1
    error_line(log, NAMES[command], "/dev/shm", "0.25 MiB", "--shm-size", "--workers")
    assert "Traceback" not in log


@pytest.mark.parametrize(("command", "more"), [("train", 4), ("evaluate", 9), ("train", 14), ("evaluate", 14)])
def test_too_few_file_descriptors_are_named_with_the_limit_and_remedies(command, more, launch, commands, tmp_path):
    """At the first worker, at the next one, when a worker sends its first batch."""
    arguments = [command, more, *commands(command, tmp_path)]
    with launch(arguments, ranks=1, module="faulty", function="few_descriptors") as started:
        until(lambda: ": error: " in started.log(0) or started.poll(0) is not None, 120, started.text)
        status, log = ended(started)
    assert status == 1
    error_line(log, NAMES[command], "ulimit -n", "--workers")
    assert "Traceback" not in log


def test_workers_of_a_run_that_is_killed_end_soon(launch, commands, tmp_path):
    """Nobody is left to kill them: they look whether their parent lives."""
    with launch([*commands("train", tmp_path)[:-2], "--epochs", "50", "--out", tmp_path / "run"], ranks=1) as started:
        children = Path(f"/proc/{started.pids[0]}/task/{started.pids[0]}/children")
        until(lambda: len(children.read_text().split()) >= 2, 120, started.text)
        workers = children.read_text().split()
        started.send(0, 9)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), SECONDS, started.text)
