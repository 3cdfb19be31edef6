"""Global order of the samples, the same on any number of processes.

The order of an epoch depends on the seed and the epoch alone. Every step takes the next global batch of it, every rank
its part of the batch; so a run can resume at any step, on any number of processes that divides the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Share(NamedTuple):
    """One rank's part of a global batch."""

    epoch: int
    """Counted from 0."""

    positions: np.ndarray
    """Places in the order of the epoch, [n] int64: what augmentation is drawn from."""

    images: np.ndarray
    """Image numbers at these places, [n] int64."""

    def split(self, parts: int) -> list[Share]:
        """In ``parts`` equal pieces, for gradient accumulation."""
        pieces = zip(np.split(self.positions, parts), np.split(self.images, parts), strict=True)
        return [Share(self.epoch, positions, images) for positions, images in pieces]


@dataclass(frozen=True, kw_only=True)
class GlobalOrder:
    """Order in which a run sees its training images.

    Args:
        length: number of training images.
        batch_size: images per step, over all processes.
        seed: seed of the order.
        repeats: how often an image comes in a batch, augmented in its own way each time (repeated augmentation, 3
            in DeiT). An epoch stays as long: with 3 repeats it sees a third of the images. The copies of an image lie
            in different thirds of the batch, usually on different ranks, next to different neighbours.

    Raises:
        ValueError: naming the value, if one is not positive or a batch is larger than an epoch.
    """

    length: int
    batch_size: int
    seed: int
    repeats: int = 1

    def __post_init__(self) -> None:
        """Check the sizes."""
        for name in ("length", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size > self.length:
            raise ValueError(f"batch_size must be at most the {self.length} training images, got {self.batch_size}")

    @property
    def steps(self) -> int:
        """Steps per epoch; an incomplete last batch is skipped."""
        return self.length // self.batch_size

    def epoch(self, epoch: int) -> np.ndarray:
        """Image numbers of a whole epoch in order, [steps · batch_size] int64."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.length)
        if self.repeats > 1:
            order = order[: -(-self.length // self.repeats)].repeat(self.repeats)
        batches = order[: self.steps * self.batch_size].reshape(self.steps, self.batch_size)
        if self.repeats > 1:  # the first copies of a batch's images, then the second ones, each in an order of its own
            copies = np.arange(self.batch_size) % self.repeats
            batches = np.take_along_axis(batches, np.argsort(copies + rng.random(batches.shape), axis=1), axis=1)
        return batches.reshape(-1)

    def shares(self, epoch: int, *, rank: int, world_size: int, first_step: int = 0) -> Iterator[Share]:
        """Yield this rank's part of the batch at every step of an epoch; all ranks' parts are the global batch.

        Args:
            epoch: counted from 0.
            rank: this process.
            world_size: number of processes; divides ``batch_size``.
            first_step: the first step, for a run that resumes in the middle of an epoch.

        Yields:
            ``batch_size / world_size`` places and images.

        Raises:
            ValueError: if the processes cannot share a batch evenly, or the epoch has no such step.
        """
        if self.batch_size % world_size:
            raise ValueError(
                f"batch_size must be a multiple of the number of processes, got {self.batch_size} on {world_size}"
            )
        if not 0 <= first_step <= self.steps:
            raise ValueError(f"first_step must be from 0 to {self.steps}, got {first_step}")
        share = self.batch_size // world_size
        images = self.epoch(epoch)
        for step in range(first_step, self.steps):
            start = step * self.batch_size + rank * share
            yield Share(epoch, np.arange(start, start + share), images[start : start + share])


def evaluation_share(length: int, *, rank: int, world_size: int) -> np.ndarray:
    """Return this rank's part of ``length`` held-out images; over all ranks, each comes exactly once."""
    return np.arange(rank, length, world_size)
