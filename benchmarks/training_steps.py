"""The three loops that the other measurements time: our Trainer's, DeepSpeed's own, and PyTorch alone.

All of them train the same model on the same images, which are in memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hatnet_train.callbacks import Checkpointing, Monitoring
from hatnet_train.config import TrainConfig
from hatnet_train.data.augment import normalise
from hatnet_train.data.loader import Batch
from hatnet_train.data.mixing import draw_mixing
from hatnet_train.deepspeed.partition import full_weights, whole_model
from hatnet_train.distributed.environment import discover
from hatnet_train.distributed.launch import join
from hatnet_train.optim import parameter_groups
from hatnet_train.recipes import build_config
from hatnet_train.run.state import RunState
from hatnet_train.trainer import Trainer

TIMEOUT = 600.0
"""Seconds that the processes of a launch wait for each other."""

BATCHES = 4
"""Different batches in memory, taken in turn."""

PLAIN = {"mixup": 0.0, "cutmix": 0.0, "ema_decay": 0.0}
"""Fields of recipe ``imagenet`` that the compared loops switch off: DeepSpeed's and PyTorch's have none of them."""


def step_config(**values: object) -> TrainConfig:
    """Recipe ``imagenet`` with ``values`` over it; the data are in memory."""
    return build_config("imagenet", {"data": "-", "workers": 0, "lr_batch_size": 0, **values})


def join_launch() -> None:
    """Join the other processes, if that is not done yet; without a launcher this process is alone."""
    if not torch.distributed.is_initialized():
        join(discover(os.environ), TIMEOUT)


def leave_launch() -> None:
    """Undo :func:`join_launch`, if it was called."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class Unread:
    """A source of so many images that are never asked for: the Trainer counts its steps by it."""

    classes = tuple(f"class-{i:04d}" for i in range(1000))

    def __init__(self, images: int) -> None:
        self.labels = np.zeros(images, dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def image(self, i: int) -> Tensor:
        """Raise AssertionError: batches are in memory."""
        raise AssertionError(f"image {i} was asked for")

    def name(self, i: int) -> str:
        """Return the number of image ``i``."""
        return f"image {i}"

    def digest(self) -> str:
        """All there is to know."""
        return str(len(self))


def make_trainer_in_memory(config: TrainConfig, out: Path, steps: int) -> Trainer:
    """Return a Trainer whose batches of noise are in memory, :data:`BATCHES` in turn, for epochs of so many steps.

    It reports and saves as ``hatnet-train`` does.

    Args:
        config: the run.
        out: folder of the run.
        steps: optimizer steps per epoch.
    """

    def loader(*_: object, world_size: int, **__: object) -> Generator[Batch, None, None]:
        yield from cycle(make_batches(config, config.optimisation.batch_size // world_size))

    data = Unread(config.optimisation.batch_size * steps)
    callbacks = [Monitoring(), Checkpointing(keep=config.checkpoints.keep_checkpoints)]
    trainer = Trainer(config, data, data, {}, callbacks=callbacks, loader=loader)
    trainer.out = out
    trainer.call("on_start")
    return trainer


def train_epoch(trainer: Trainer, epoch: int) -> dict[str, float]:
    """Train one epoch, counted from 0, without evaluation and checkpoint; its metrics."""
    trainer.state = RunState(step=epoch * trainer.order.steps)
    trainer.train_epoch(epoch)
    return trainer.state.metrics(trainer.order.batch_size)


def make_batches(config: TrainConfig, size: int) -> list[Batch]:
    """Batches of noise as a loader would hand them over."""
    draw = torch.Generator().manual_seed(config.optimisation.seed)
    shape = (size, 3, config.images.image_size, config.images.image_size)
    mixing = [
        draw_mixing(config.images.image_size, config.augmentation.mixup, config.augmentation.cutmix)
        for _ in range(size // 2 * config.mixes)
    ]
    return [
        Batch(
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw),
            torch.randint(0, 1000, (size,), generator=draw),
            torch.tensor(mixing) if mixing else torch.empty(0, 5),
            bad=(),
        )
        for _ in range(BATCHES)
    ]


def close(*trainers: Trainer) -> None:
    """End what writes to the run folders, so that they can be removed."""
    for trainer in trainers:
        trainer.batches.close()
        trainer.call("close")


def trainer_seconds(trainer: Trainer) -> float:
    """Seconds a step of our loop over one of its epochs, without the wait for data."""
    row = train_epoch(trainer, 0)
    return row["seconds"] * (1 - row["data_wait"]) / trainer.order.steps


def deepspeed_seconds(trainer: Trainer) -> float:
    """Seconds a step of the loop that DeepSpeed's documentation shows, on the engine of ``trainer``."""
    engine, steps = trainer.engine, trainer.order.steps
    batches = ready_batches(trainer)
    engine.train()
    _wait_for_device()
    start = time.perf_counter()
    for _ in range(steps):
        images, labels = next(batches)
        loss = F.cross_entropy(
            engine(images).float(), labels, label_smoothing=trainer.config.augmentation.label_smoothing
        )
        engine.backward(loss)
        engine.step()
    _wait_for_device()
    return (time.perf_counter() - start) / steps


class PlainLoop:
    """PyTorch alone: a copy of the model of ``trainer``, the fused AdamW, the same precision and rates."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.model = whole_model(trainer.engine, full_weights(trainer.engine)).train()
        groups = parameter_groups(self.model, trainer.config.optimisation.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=trainer.engine.get_lr()[0], fused=True)
        precision, device = trainer.config.compute.precision, trainer.engine.device.type
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def seconds(self) -> float:
        """Seconds a step."""
        smoothing, steps = self.trainer.config.augmentation.label_smoothing, self.trainer.order.steps
        batches = ready_batches(self.trainer)
        _wait_for_device()
        start = time.perf_counter()
        for _ in range(steps):
            images, labels = next(batches)
            with self.autocast:
                loss = F.cross_entropy(self.model(images).float(), labels, label_smoothing=smoothing)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        _wait_for_device()
        return (time.perf_counter() - start) / steps


def ready_batches(trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of ``trainer`` on the device, normalised, in turn: the best case of any loop."""
    device = trainer.engine.device
    batches = list(islice(trainer.batches, BATCHES))
    return cycle([(normalise(batch.images.to(device)), batch.labels.to(device)) for batch in batches])


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
