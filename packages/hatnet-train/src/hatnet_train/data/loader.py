"""Batches from a source, by any number of workers, the same whatever their number and that of the processes.

A worker makes a whole batch: it decodes and augments the images and draws what the mixing on the device needs, all
from the seed, the epoch and the place of the image in the global order (``sampler.py``).
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from hatnet_train.config import TrainConfig
from hatnet_train.data.augment import TrainTransform, centre_crop, normalise, own_generators, seed_generators
from hatnet_train.data.mixing import draw_mixing, mix, mix_labels
from hatnet_train.data.order import GlobalOrder, Share, evaluation_share
from hatnet_train.data.source import Source
from hatnet_train.signals import ignore_in_worker
from hatnet_train.workers import OF_THE_MACHINE, WorkerError, child_signal_unhandled, kill

logger = logging.getLogger(__name__)

MIXING = 1
"""Added to the key of an image's generator for the draws of its pair's mixing."""

TRIES = 16
"""Images in a row that may be bad where the next one takes the place of a bad one."""

_ABANDONED: list[Any] = []
"""Iterators of torch whose workers were killed: their destructor might wait for a lock that a worker held."""


class Batch(NamedTuple):
    """Batch as a worker makes it."""

    images: Tensor
    """[B, 3, size, size], uint8."""

    labels: Tensor
    """[B], int64; -1 for an image that only fills up an evaluation batch."""

    mixing: Tensor
    """[B / 2, 5], float32: of each pair the share of the image itself and the box (``mixing.py``); [0, 5] without."""

    bad: tuple[str, ...]
    """Reasons why images could not be read and were replaced or skipped; empty where that is an error."""

    def report_bad(self) -> int:
        """Log the images that could not be read, on any rank; return their number."""
        for problem in self.bad:
            logger.warning("skipped: %s", problem, extra={"all_ranks": True})
        return len(self.bad)


def global_order(source: Source, config: TrainConfig) -> GlobalOrder:
    """Order in which a run sees its training images."""
    options = config.optimisation
    return GlobalOrder(
        length=len(source), batch_size=options.batch_size, seed=options.seed, repeats=config.augmentation.repeats
    )


def train_batches(
    source: Source,
    order: GlobalOrder,
    config: TrainConfig,
    *,
    rank: int,
    world_size: int,
    first_step: int = 0,
    skipped: Collection[int] = (),
) -> Generator[Batch, None, None]:
    """Yield this rank's micro-batches of all epochs of a run in order, by ``config.images.workers`` workers.

    Args:
        source: the training images.
        order: the order in which the run sees them.
        config: the run.
        rank: this process.
        world_size: number of processes.
        first_step: the step of the whole run to begin with.
        skipped: steps of the whole run to skip.

    Returns:
        For every step ``accumulation`` batches of ``batch_size / world_size / accumulation`` images. The next one
        raises ValueError, naming the image, if one cannot be read and ``on_bad_image`` is strict.

    Raises:
        ValueError: if timm does not know the augmentation.
    """
    first_epoch, first_step = divmod(first_step, order.steps)

    def shares() -> Iterator[Share]:
        for epoch in range(first_epoch, config.optimisation.epochs):
            start = first_step if epoch == first_epoch else 0
            shares = order.shares(epoch, rank=rank, world_size=world_size, first_step=start)
            for step, share in enumerate(shares, epoch * order.steps + start):
                if step not in skipped:
                    yield from share.split(config.compute.accumulation)

    return load(_Training(source, config), shares(), config.images.workers)


def evaluation_batches(
    source: Source,
    *,
    size: int,
    crop_fraction: float,
    batch_size: int,
    workers: int,
    rank: int,
    world_size: int,
    skip_bad: bool = False,
) -> Generator[Batch, None, None]:
    """Yield this rank's part of the held-out images in batches; over all ranks every image comes exactly once.

    Every rank gets as many batches of as many images, because under ZeRO-3 all take part in every forward pass: what
    is missing at the end is filled up with images whose label is -1.

    Args:
        source: the held-out images.
        size: side of the square input in pixels.
        crop_fraction: share of the short side that the centre crop takes.
        batch_size: images per batch and process.
        workers: data workers; 0 for this process itself.
        rank: this process.
        world_size: number of processes.
        skip_bad: do not count images that cannot be read.

    Raises:
        ValueError: naming the image, if one cannot be read and is not to be skipped.
    """
    own = evaluation_share(len(source), rank=rank, world_size=world_size)
    batch_size = min(batch_size, -(-len(source) // world_size))
    batches = -(-len(source) // (world_size * batch_size))
    padded = np.concatenate([own, np.full(batches * batch_size - len(own), -1, own.dtype)])
    make = _Evaluation(source, size, crop_fraction, skip_bad)
    yield from load(make, iter(padded.reshape(batches, batch_size)), workers)


def prepare(batch: Batch, config: TrainConfig, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor, float]:
    """Finish a training batch on the device: normalise and mix it.

    Returns:
        Images [B, 3, S, S]; targets, [B] or of mixed images [B, K]; label smoothing that the targets lack.
    """
    images = normalise(batch.images.to(device, non_blocking=True))
    targets = batch.labels.to(device, non_blocking=True)
    smoothing = config.augmentation.label_smoothing
    if not config.mixes:
        return images, targets, smoothing
    mixing = batch.mixing.to(device, non_blocking=True)
    return mix(images, mixing), mix_labels(targets, mixing, num_classes, smoothing), 0.0


class _Training:
    """Makes an augmented micro-batch of a share of the order."""

    def __init__(self, source: Source, config: TrainConfig) -> None:
        self.source = source
        self.config = config
        self.transform = TrainTransform(config)

    def __call__(self, share: Share) -> Batch:
        key = (self.config.optimisation.seed, share.epoch)
        images, labels, draws = [], [], []
        bad: list[str] = []
        with own_generators():
            for position, i in zip(share.positions.tolist(), share.images.tolist(), strict=True):
                image, label = self._read(i, bad)
                seed_generators(*key, position)
                images.append(self.transform(image))
                labels.append(label)
            for position in share.positions[::2].tolist() if self.config.mixes else []:
                seed_generators(*key, position, MIXING)
                draws.append(
                    draw_mixing(
                        self.config.images.image_size, self.config.augmentation.mixup, self.config.augmentation.cutmix
                    )
                )
        return Batch(
            default_collate(images),  # in a worker, straight into shared memory
            torch.tensor(labels),
            torch.tensor(draws).reshape(len(draws), 5),
            tuple(bad),
        )

    def _read(self, i: int, bad: list[str]) -> tuple[Tensor, int]:
        """Image ``i`` and its label or, in place of a bad one, those of the next good one, whoever reads them."""
        for number in range(i, i + TRIES):
            place = number % len(self.source)
            try:
                return self.source.image(place), int(self.source.labels[place])
            except ValueError as error:
                if self.config.faults.on_bad_image == "strict":
                    raise
                bad.append(str(error))
        raise ValueError(f"{TRIES} images in a row cannot be read, the last because: {bad[-1]}")


class _Evaluation:
    """Makes a batch of centre crops of image numbers."""

    def __init__(self, source: Source, size: int, crop_fraction: float, skip_bad: bool) -> None:
        self.source = source
        self.size = size
        self.crop_fraction = crop_fraction
        self.skip_bad = skip_bad

    def __call__(self, numbers: np.ndarray) -> Batch:
        images = torch.zeros(len(numbers), 3, self.size, self.size, dtype=torch.uint8)
        labels = torch.full((len(numbers),), -1)
        bad = []
        for place, i in [(place, i) for place, i in enumerate(numbers.tolist()) if i >= 0]:
            try:
                images[place] = centre_crop(self.source.image(i), self.size, self.crop_fraction)
                labels[place] = int(self.source.labels[i])
            except ValueError as error:
                if not self.skip_bad:
                    raise
                bad.append(str(error))
        return Batch(images, labels, torch.empty(0, 5), tuple(bad))


class _Failure(NamedTuple):
    """An error of a worker as strings: not every exception can be pickled."""

    reason: str
    trace: str
    of_data: bool
    """An image is to blame, which ``reason`` names."""

    def raise_(self) -> NoReturn:
        raise ValueError(self.reason) if self.of_data else WorkerError(self.reason, self.trace)


class _Parcel:
    """An item on its way from a worker.

    It is pickled when made: in the thread of the queue, a failure would lose the item silently.
    """

    def __init__(self, content: Any) -> None:
        self.payload = bytes(ForkingPickler.dumps(content))
        for end in os.pipe():  # or raise: with fewer descriptors left, nobody could fetch the tensors, but would wait
            os.close(end)

    def open(self) -> Any:
        try:
            return ForkingPickler.loads(self.payload)
        except (EOFError, OSError, RuntimeError) as error:
            raise WorkerError(f"cannot receive a batch: {type(error).__name__}: {error}") from error

    def pin_memory(self) -> Any:
        """Pin the memory, in the loader's thread."""
        content = self.open()
        if isinstance(content, Batch):
            images, labels, mixing, bad = content
            return Batch(images.pin_memory(), labels.pin_memory(), mixing.pin_memory(), bad)
        return content


class _Items(Dataset[Any]):
    """Dataset of made items; in a worker, an error is an item, too."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __getitems__(self, item: Any) -> Any:
        if get_worker_info() is None:
            return self.make(item)
        try:
            return _Parcel(self.make(item))
        except Exception as error:
            return _failure(error)


def _failure(error: Exception) -> _Failure:
    if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno not in OF_THE_MACHINE):
        return _Failure(str(error), "", of_data=True)
    reason = f"{type(error).__name__}: {error}".removesuffix(": ").partition("\n")[0]
    return _Failure(reason, traceback.format_exc(), of_data=False)


def load(make: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Generator[Any, None, None]:
    """Yield ``make`` of every item in order, made by workers that never outlive this generator.

    Raises:
        ValueError: naming the image that ``make`` cannot read.
        WorkerError: if a worker fails in another way, is killed, or cannot be started.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more than there are cores: as asked for
        loader = DataLoader(
            _Items(make),
            batch_sampler=items,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it would draw from the generator of dropout and stochastic depth
        )
        others = set(multiprocessing.active_children())
        try:
            with child_signal_unhandled():
                batches = iter(loader)  # warns once more
        except Exception as error:
            _ABANDONED.append(error)  # which refers to what the loader had made by then
            kill(set(multiprocessing.active_children()) - others)
            raise WorkerError(f"cannot start data workers: {type(error).__name__}: {error}") from error
    own = set(multiprocessing.active_children()) - others
    try:
        for batch in batches:
            content = batch.open() if isinstance(batch, _Parcel) else batch
            if isinstance(content, _Failure):
                content.raise_()
            yield content
    except BaseException as error:
        _ABANDONED.append(batches)
        if any(worker.exitcode == -signal.SIGBUS for worker in own):
            raise WorkerError("a worker ended with a bus error: shared memory is full") from error
        raise
    finally:
        kill(own)


def _unchanged(batch: Any) -> Any:
    return batch


def _begin_worker(worker: int) -> None:
    gc.freeze()  # what the process before left to its collector, such as connections with threads, is not to end here
    torch.set_num_threads(1)
    ignore_in_worker()
    sys.excepthook = lambda *_: None  # of the thread that hands out tensors: the command reports what it lacks
