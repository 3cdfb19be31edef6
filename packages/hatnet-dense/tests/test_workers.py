"""Data workers that fail: the command ends at once with status 1 and the cause, and leaves no process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SHAPES
from hatnet_testing import error_line

STEPS = """
import os, signal, time
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS


@TRANSFORMS.register_module()
class Failing(BaseTransform):
    def __init__(self, how, prob):
        self.how = how

    def transform(self, results):
        if results["sample_idx"] % 2 and self.how == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while True:
                time.sleep(1)
        if self.how in ("memory", "deaf"):
            raise MemoryError("no room for the pixels")
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return results
"""
FEW_DESCRIPTORS = "ulimit -n 40"
SMALL = "mount -t tmpfs -o size=256k tmpfs /dev/shm"


def unshared():
    """Return a prefix that gives a command its own /dev/shm, empty where that is not allowed."""
    words = ["unshare", "--map-root-user", "--mount", "bash", "-c"]
    allowed = subprocess.run([*words, SMALL], capture_output=True, check=False).returncode == 0
    return words if allowed else []


def train(folder, how, shapes, words=("bash", "-c"), before="true"):
    """Train with two workers until the failure; the status, the last line of stderr, and the seconds it took.

    Counted from when the data is checked and the workers begin.
    """
    (folder / "failing.py").write_text(STEPS)
    (folder / "config.py").write_text(
        f"_base_ = {str(SHAPES / 'retinanet.py')!r}\ncustom_imports = dict(imports=['hatnet_dense', 'failing'])\n"
    )
    options = ["train_dataloader.num_workers=2", "val_cfg=None", "val_dataloader=None", "val_evaluator=None"]
    options += ["train_dataloader.dataset.pipeline.3.type=Failing", f"train_dataloader.dataset.pipeline.3.how={how}"]
    command = [sys.executable, "-m", "hatnet_dense", "train", "config.py", "--work-dir", "run"]
    out, errors = folder / "stdout", folder / "stderr"
    with out.open("w") as stdout, errors.open("w") as stderr:
        run = subprocess.Popen(
            [*words, f'{before} && exec "$@"', "bash", *command, "--cfg-options", *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder), "SHAPES": str(shapes), "MARK": str(folder)},
            stdout=stdout,
            stderr=stderr,
        )
    began, limit = None, time.monotonic() + 120
    while run.poll() is None and time.monotonic() < limit:
        if began is None and "training data: " in out.read_text():
            began = time.monotonic()
        time.sleep(0.1)
    ended = time.monotonic()
    if run.poll() is None:
        run.kill()
        run.wait()
    return run.returncode, errors.read_text().splitlines()[-1], ended - began


def left(folder):
    """List processes that this test started and that still run."""
    marked = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"MARK={folder}".encode() in place.read_bytes().split(b"\0"):
                marked.append(int(place.parent.name))
    return marked


@pytest.mark.parametrize("how", ["deaf", *(pytest.param(how, marks=pytest.mark.slow) for how in ("memory", "killed"))])
def test_a_failing_worker_ends_training_at_once_with_the_cause(how, shapes, tmp_path):
    named = [] if how == "killed" else ["no room for the pixels"]
    ended(train(tmp_path, how, shapes), named, tmp_path)


def test_too_little_shared_memory_ends_training_at_once_with_its_size(shapes, tmp_path):
    words = unshared()
    if not words:
        pytest.skip("a /dev/shm of another size needs a mount namespace, which this machine does not allow")
    ended(train(tmp_path, "not", shapes, words, SMALL), ["/dev/shm", "0.25 MiB", "--shm-size"], tmp_path)


def test_too_few_file_descriptors_end_training_at_once_with_the_remedy(shapes, tmp_path):
    ended(train(tmp_path, "not", shapes, before=FEW_DESCRIPTORS), ["ulimit -n"], tmp_path)


def ended(outcome, named, folder):
    """Check that a run ended soon, left no process, and named the cause and the option that helps."""
    status, line, seconds = outcome
    processes = left(folder)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    assert status == 1
    error_line(line, "hatnet-dense train", "train_dataloader.num_workers", *named)
    assert seconds < 10
    assert processes == []
