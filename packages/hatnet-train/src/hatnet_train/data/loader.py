"""Batches from a source, by any number of workers, the same whatever their number and that of the processes.

A worker makes a whole batch: it decodes and augments the images and draws what the mixing on the device needs, all
from the seed, the epoch and the place of the image in the global order (``sampler.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from hatnet_train.config import TrainConfig
from hatnet_train.data.augment import TrainTransform, centre_crop, own_generators, seed_generators
from hatnet_train.data.mixing import draw_mixing
from hatnet_train.data.source import Source
from hatnet_train.sampler import GlobalOrder, Share, evaluation_share

MIXING = 1
"""Added to the key of an image's generator for the draws of its pair's mixing."""


class Batch(NamedTuple):
    """What a worker hands over."""

    images: Tensor
    """[B, 3, size, size], uint8."""

    labels: Tensor
    """[B], int64; -1 for an image that only fills up an evaluation batch."""

    mixing: Tensor
    """[B / 2, 5], float32: of each pair the share of the image itself and the box (``mixing.py``); [0, 5] without."""


def train_batches(
    source: Source, order: GlobalOrder, config: TrainConfig, *, rank: int, world_size: int, first_step: int = 0
) -> Iterator[Batch]:
    """This rank's micro-batches of all epochs of a run, one after the other, with ``config.workers`` workers.

    Args:
        source: the training images.
        order: the order in which the run sees them.
        config: the run.
        rank: this process.
        world_size: number of processes.
        first_step: the step of the whole run to begin with.

    Returns:
        For every step ``config.accumulation`` batches of ``batch_size / world_size / accumulation`` images. The next
        one raises ValueError, naming the image, if one cannot be read.

    Raises:
        ValueError: if the augmentation is none that timm knows.
    """
    first_epoch, first_step = divmod(first_step, order.steps)

    def shares() -> Iterator[Share]:
        for epoch in range(first_epoch, config.epochs):
            start = first_step if epoch == first_epoch else 0
            for share in order.shares(epoch, rank=rank, world_size=world_size, first_step=start):
                yield from share.split(config.accumulation)

    return _load(_Training(source, config), shares(), config.workers)


def evaluation_batches(
    source: Source, *, size: int, crop_fraction: float, batch_size: int, workers: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """This rank's part of the held-out images in batches; over all ranks every image comes exactly once.

    Every rank gets as many batches of as many images, because under ZeRO-3 all take part in every forward pass: what
    is missing at the end is filled up with images whose label is -1.

    Args:
        source: the held-out images.
        size: side of the square input in pixels.
        crop_fraction: share of the short side that the centre crop takes.
        batch_size: images a batch and process.
        workers: data workers; 0 for this process itself.
        rank: this process.
        world_size: number of processes.

    Raises:
        ValueError: naming the image, if one cannot be read.
    """
    own = evaluation_share(len(source), rank=rank, world_size=world_size)
    batch_size = min(batch_size, -(-len(source) // world_size))
    batches = -(-len(source) // (world_size * batch_size))
    padded = np.concatenate([own, np.full(batches * batch_size - len(own), -1, own.dtype)])
    yield from _load(_Evaluation(source, size, crop_fraction), iter(padded.reshape(batches, batch_size)), workers)


class _Training:
    """Makes an augmented micro-batch of a share of the order."""

    def __init__(self, source: Source, config: TrainConfig) -> None:
        self.source = source
        self.config = config
        self.transform = TrainTransform(config)

    def __call__(self, share: Share) -> Batch:
        key = (self.config.seed, share.epoch)
        images, draws = [], []
        with own_generators():
            for position, i in zip(share.positions.tolist(), share.images.tolist(), strict=True):
                seed_generators(*key, position)
                images.append(self.transform(self.source.image(i)))
            for position in share.positions[::2].tolist() if self.config.mixes else []:
                seed_generators(*key, position, MIXING)
                draws.append(draw_mixing(self.config.image_size, self.config.mixup, self.config.cutmix))
        return Batch(
            default_collate(images),  # in a worker, straight into shared memory
            torch.from_numpy(self.source.labels[share.images]),
            torch.tensor(draws).reshape(len(draws), 5),
        )


class _Evaluation:
    """Makes a batch of centre crops of image numbers."""

    def __init__(self, source: Source, size: int, crop_fraction: float) -> None:
        self.source = source
        self.size = size
        self.crop_fraction = crop_fraction

    def __call__(self, numbers: np.ndarray) -> Batch:
        images = torch.zeros(len(numbers), 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.full((len(numbers),), -1)
        for place, i in enumerate(numbers.tolist()):
            if i >= 0:
                images[place] = centre_crop(self.source.image(i), self.size, self.crop_fraction)
                labels[place] = int(self.source.labels[i])
        return Batch(images, labels, torch.empty(0, 5))


class _Batches(Dataset[Any]):
    """What the workers run. Errors of images are handed over as messages: raised, they would carry a traceback."""

    def __init__(self, make: Callable[[Any], Batch]) -> None:
        self.make = make

    def __getitems__(self, item: Any) -> Batch | str:
        try:
            return self.make(item)
        except (ValueError, OSError) as error:
            return str(error)


def _load(make: Callable[[Any], Batch], items: Iterable[Any], workers: int) -> Iterator[Batch]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more than there are cores: as asked for
        loader = DataLoader(
            _Batches(make),
            batch_sampler=items,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # else it would draw from the generator of dropout and stochastic depth
        )
        batches = iter(loader)  # warns once more
    for batch in batches:
        if isinstance(batch, str):
            raise ValueError(batch)
        yield batch


def _unchanged(batch: Any) -> Any:
    return batch


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
