"""hatnet-train with a fault inside of one of its processes, for what no signal and no file can bring about."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from itertools import islice

import torch

from hatnet_train import cli
from hatnet_train.callbacks import Callback, register
from hatnet_train.cli import train
from hatnet_train.data import folder, loader
from hatnet_train.deepspeed.partition import gradients
from hatnet_train.run import checkpoint

NOT_A_NUMBER, INFINITE = 4, 7
"""Steps, from 0, at which rank 1 has images that are not numbers, and rank 0 an infinite gradient."""

OPENING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "half written"}
"""Audit events at which :func:`die_while_saving` may kill its process."""


class NotFinite(Callback):
    """Let rank 1 have images that are not numbers, and rank 0 an infinite gradient."""

    def on_start(self, trainer):
        def poison(module, inputs):
            if module.training and trainer.state.step == NOT_A_NUMBER and trainer.rank == 1:
                return (inputs[0] * torch.nan, *inputs[1:])
            return None

        trainer.engine.module.register_forward_pre_hook(poison)

    def after_backward(self, trainer, loss):
        if trainer.state.step == INFINITE and trainer.rank == 0:
            for gradient in islice(gradients(trainer.engine), 1):  # under ZeRO there are none before the last pass
                gradient.view(-1)[0] = torch.inf


def not_finite(arguments):
    """hatnet-train whose ranks meet values that are not finite."""
    register(NotFinite)
    return train(arguments)


class WithoutThoseSteps(Callback):
    """Skip the steps of :class:`NotFinite` from the beginning."""

    def on_start(self, trainer):
        if not trainer.state.skipped:
            trainer.restart(None, skipped=[NOT_A_NUMBER, INFINITE])


def without_those_steps(arguments):
    """hatnet-train that skips these steps from the beginning."""
    register(WithoutThoseSteps)
    return train(arguments)


def open_to_all(arguments):
    """hatnet-train started where new files are for everybody to change."""
    os.umask(0)
    return train(arguments)


def die_while_saving(arguments):
    """Commit and tidy checkpoints, and die by SIGKILL at the given event; 0 if there are not so many."""
    folder, last = arguments
    left = int(last)

    def count(event, _):
        nonlocal left
        if event in OPENING:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)

    sys.addaudithook(count)
    save(checkpoint.Path(folder), 2)
    left = 0
    return 0


def save(folder, step):
    """Commit a checkpoint of two files, and keep no other."""

    def write(path):
        with path.open("wb") as file:
            file.write(b"a" * 5000)
            file.flush()
            sys.audit("half written")
            file.write(b"b" * step)

    name = checkpoint.folder_name(step, evaluated=False)
    checkpoint.tidy(folder, 1, checkpoint.commit(folder, name, {"one": write, "two": write}, {}))


class Hang(Callback):
    """Let a rank not return from a step."""

    def __init__(self, rank):
        self.rank = rank

    def after_step(self, trainer, step):
        while trainer.state.step == NOT_A_NUMBER and trainer.rank == self.rank:
            time.sleep(1)


def hang(arguments, hanging=1):
    """hatnet-train one rank of which does not come back from a step."""
    register(lambda: Hang(hanging))
    return train(arguments)


def hang_first(arguments):
    """:func:`hang`, rank 0."""
    return hang(arguments, hanging=0)


class ShowEvaluation(Callback):
    """Leave a file ``evaluating`` when the evaluation has begun."""

    def before_wait(self, trainer):
        if not trainer.engine.training:
            (trainer.out / "evaluating").touch()


def show_evaluation(arguments):
    """hatnet-train that leaves a file ``evaluating`` when it has begun to."""
    register(ShowEvaluation)
    return train(arguments)


class FullAtTheEnd(Callback):
    """Fill the disk after the last checkpoint."""

    def after_epoch(self, trainer, row):
        if trainer.rank == 0 and row["epoch"] == trainer.config.optimisation.epochs:
            with contextlib.suppress(OSError), (trainer.out / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1_000_000))


def full_at_the_end(arguments):
    """hatnet-train whose disk gets full just before the final weights are written."""
    register(FullAtTheEnd)
    return train(arguments)


class OddError(Exception):
    """An error that cannot be made again from its message alone, as unpickling would."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def _raise(error):
    raise error


FAULTS = {
    "memory": lambda: _raise(MemoryError()),
    "odd": lambda: _raise(OddError("odd", "error")),
    "interrupted": lambda: _raise(KeyboardInterrupt()),
    "exit": lambda: os._exit(3),
    "killed": lambda: os.kill(os.getpid(), 9),
    "bus error": lambda: os.kill(os.getpid(), 7),
}
"""What happens in a data worker that reads an image."""


def failing_images(arguments):
    """A command in whose data workers a fault happens, and then is marked by a file."""
    name, fault, mark, *arguments = arguments

    def image(self, i):
        checkpoint.Path(mark).touch()
        FAULTS[fault]()

    folder.Folder.image = image
    return getattr(cli, name)(arguments)


def few_descriptors(arguments):
    """A command that may open a few files more than it has, when its data workers start."""
    name, more, *arguments = arguments
    load = loader.load

    def limited(*args):
        count = max(int(entry.name) for entry in checkpoint.Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + int(more), count + int(more)))
        return load(*args)

    loader.load = limited
    return getattr(cli, name)(arguments)


def command(arguments):
    """Any command."""
    return subprocess.run(arguments, check=False).returncode
