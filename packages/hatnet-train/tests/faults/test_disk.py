"""A run folder that is full, read-only or gone: the checkpoint before remains, and the run says what happened."""

import errno
import os
import shutil
import subprocess

import pytest
from runs import assert_all_whole, assert_same_bits, steps

from hatnet_testing import error_line
from hatnet_train.callbacks import FAILED_SAVES
from hatnet_train.run.checkpoint import committed
from launches import Launch, Warm, lines_naming, until

TOO_SMALL = "size=320m"
"""For two checkpoints of 200 MB."""


class Disk:
    """A small file system of its own, which only the processes see that are started here."""

    def __init__(self, warm, folder, logs):
        self.warm, self.folder, self.logs = warm, folder, logs
        self.seen = warm.root / folder.relative_to("/")
        folder.mkdir()
        self.mount("-t", "tmpfs", "-o", TOO_SMALL, "tmpfs", folder)

    def mount(self, *arguments):
        with self.start(["mount", *arguments], ranks=1, module="faulty", function="command") as process:
            assert process.wait(30) == [0], process.text()

    def start(self, arguments, *, ranks=2, **kwargs):
        return Launch(self.warm, self.logs, ranks, arguments, **kwargs)


@pytest.fixture(scope="module")
def secluded():
    """A process with mounts of its own."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let its users mount file systems in a namespace")
    process = Warm("unshare", "-rm")
    yield process
    process.end()


@pytest.fixture
def disk(secluded, tmp_path):
    """A full disk, nearly."""
    return Disk(secluded, tmp_path / "disk", tmp_path / "logs")


@pytest.fixture
def command(everything):
    """Arguments of the run but the folder."""
    return [*everything, "--zero-stage", "1", "--checkpoint-steps", "1", "--keep-checkpoints", "1", "--resume", "auto"]


@pytest.mark.slow
def test_a_run_goes_on_when_the_full_disk_has_space_again(disk, command, whole):
    failed = ["warning", "step 2 ", disk.folder / "run" / "checkpoints", os.strerror(errno.ENOSPC)]
    with disk.start([*command, "--out", disk.folder / "run"]) as started:
        until(lambda: lines_naming(started.log(0), *failed), 120, started.text)
        disk.mount("-o", "remount,size=4g", disk.folder)
        assert started.wait() == [0, 0], started.text()
    assert_same_bits(disk.seen / "run", whole(1))


def stay_full(disk, run):
    """Nothing to be done: the disk takes one checkpoint."""


def become_read_only(disk, run):
    """The folder of the checkpoints cannot be written to any more."""
    folder = run / "checkpoints"
    disk.mount("--bind", folder, folder)
    disk.mount("-o", "remount,bind,ro", folder)


def vanish(disk, run):
    """The run folder is gone, to another place."""
    seen = disk.seen / run.relative_to(disk.folder)
    seen.rename(seen.with_name("elsewhere"))


@pytest.mark.parametrize(
    ("fault", "reason", "left"),
    [
        (stay_full, errno.ENOSPC, "run"),
        pytest.param(become_read_only, errno.EROFS, "run", marks=pytest.mark.slow),
        pytest.param(vanish, errno.ENOENT, "elsewhere", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_cannot_save_stops_on_all_ranks_and_its_checkpoint_remains(
    fault, reason, left, disk, command, whole, train, tmp_path
):
    run = disk.folder / "run"
    if fault != stay_full:
        disk.mount("-o", "remount,size=4g", disk.folder)
    remains = disk.seen / left
    with disk.start([*command, "--out", run]) as started:
        until(lambda: steps(disk.seen / "run"), 120, started.text)
        fault(disk, run)
        until(lambda: started.poll(0) is not None, 120, started.text)
        failed = [run / "checkpoints", os.strerror(reason)]
        assert len(lines_naming(started.log(0), "warning", *failed)) == FAILED_SAVES - 1
        error_line(started.log(0), "hatnet-train", *failed)
        assert_all_whole(remains)
        assert [p.name for p in (remains / "checkpoints").iterdir()] == [
            p.name for p in committed(remains / "checkpoints")
        ]
        assert not (disk.seen / "run").exists() or left == "run"
        shutil.copytree(remains, tmp_path / "copy")
        train(*command, "--checkpoint-steps", "0", "--out", tmp_path / "copy")
        assert started.wait() == [1, 1]  # rank 1 leaves rank 0 the time to speak
        assert "Traceback" not in started.text()
    assert_same_bits(tmp_path / "copy", whole(1))


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_end_keeps_the_run_for_another_try(disk, command, whole):
    disk.mount("-o", "remount,size=700m", disk.folder)
    run = disk.folder / "run"
    with disk.start([*command, "--out", run], module="faulty", function="full_at_the_end") as started:
        assert started.wait() == [1, 1], started.text()
        error_line(started.log(0), "hatnet-train", run, os.strerror(errno.ENOSPC), "--resume")
    assert not (disk.seen / "run" / "model.safetensors").exists()
    (disk.seen / "run" / "ballast").unlink()
    with disk.start([*command, "--out", run]) as started:
        assert started.wait() == [0, 0], started.text()
    assert_same_bits(disk.seen / "run", whole(1))
