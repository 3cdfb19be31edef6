"""Shared by the tests of hatnet-train: a checkpoint to predict with, and running the commands for real."""

import os
import signal
import subprocess

import pytest
import torch

from hatnet_core import create_model, save_checkpoint
from hatnet_train.data.augment import MEAN, STD
from hatnet_train.data.shard_writer import write_shards
from image_folders import make_image_folder
from launches import BIN, Launch, Warm


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """An untrained model.safetensors as hatnet-train writes it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    classes = [str(digit) for digit in range(10)]
    save_checkpoint(
        create_model("hatnet_tiny", num_classes=10),
        path,
        {"classes": classes, "image_size": 32, "crop_fraction": 1.0, "mean": MEAN, "std": STD},
    )
    return path


@pytest.fixture(scope="session")
def run_command():
    """Run a command of this environment to its end; it and what it started are ended after ten minutes."""

    def run(*command, cwd=None):
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a group of its own, so that a launcher ends with all that it launched
        )
        try:
            out, err = process.communicate(timeout=600)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def warm():
    """The process that the others are forked from."""
    process = Warm()
    yield process
    process.end()


@pytest.fixture(scope="session")
def launch(warm, tmp_path_factory):
    """Starts the processes of a launch, at the end of which none is left."""
    logs = tmp_path_factory.mktemp("logs")

    def start(arguments, *, ranks=2, **kwargs):
        return Launch(warm, logs, ranks, arguments, **kwargs)

    return start


@pytest.fixture(scope="session")
def train(launch):
    """Runs hatnet-train, or another command of its cli.py, to its end; the text of its ranks."""

    def run(*arguments, ranks=2, expected=0, function="train"):
        with launch(arguments, ranks=ranks, function=function) as started:
            assert started.wait() == [expected] * ranks, started.text()
            return started.text()

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageNet-layout folder of a few small images."""
    root = tmp_path_factory.mktemp("images")
    make_image_folder(root)
    return root


@pytest.fixture(scope="module")
def made(images, tmp_path_factory):
    """The images as shards of a few images each."""
    out = tmp_path_factory.mktemp("made") / "shards"
    write_shards(images, out, shard_megabytes=0.03)
    return out
