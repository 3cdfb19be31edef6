"""hatnet-train with a fault inside of one of its processes, for what no signal and no file can bring about."""

import contextlib
import os
import resource
import subprocess
import sys
import time
from itertools import islice

import torch

from hatnet_train import checkpoint, cli, state, trainer
from hatnet_train.cli import train
from hatnet_train.data import folder, loader
from hatnet_train.sharding import gradients

NOT_A_NUMBER, INFINITE = 4, 7
"""Steps, from 0, at which rank 1 has images that are not numbers, and rank 0 an infinite gradient."""

OPENING = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "half written"}
"""Audit events at which :func:`die_while_saving` may kill its process."""


def not_finite(arguments):
    """hatnet-train whose ranks meet values that are not finite."""
    whole_pass, normalise = trainer.Trainer._pass, trainer.normalise

    def poisoned(self, batch):
        hit = self.state.step == NOT_A_NUMBER and self.rank == 1
        trainer.normalise = lambda images: normalise(images) * (torch.nan if hit else 1.0)
        loss = whole_pass(self, batch)
        if self.state.step == INFINITE and self.rank == 0:
            for gradient in islice(gradients(self.engine), 1):  # under ZeRO there are none before the last pass
                gradient.view(-1)[0] = torch.inf
        return loss

    trainer.Trainer._pass = poisoned
    return train(arguments)


def without_those_steps(arguments):
    """hatnet-train that leaves these steps out from the beginning."""
    trainer.RunState = lambda: state.RunState(skipped=[NOT_A_NUMBER, INFINITE])
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


def hang(arguments, hanging=1):
    """hatnet-train one rank of which does not come back from a step."""
    step = trainer.Trainer._step

    def stuck(self):
        while self.state.step == NOT_A_NUMBER and self.rank == hanging:
            time.sleep(1)
        return step(self)

    trainer.Trainer._step = stuck
    return train(arguments)


def hang_first(arguments):
    """:func:`hang`, rank 0."""
    return hang(arguments, hanging=0)


def show_evaluation(arguments):
    """hatnet-train that leaves a file ``evaluating`` when it has begun to."""
    between = trainer.Trainer._between

    def shown(self, batch):
        (self.out / "evaluating").touch()
        between(self, batch)

    trainer.Trainer._between = shown
    return train(arguments)


def full_at_the_end(arguments):
    """hatnet-train whose disk gets full just before the final weights are written."""
    finish = trainer.Trainer.finish

    def without_space(self):
        if self.rank == 0:
            with contextlib.suppress(OSError), (self.out / "ballast").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1_000_000))
        finish(self)

    trainer.Trainer.finish = without_space
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
