"""Images per second of one data worker: our three sources compared with timm's loader on the same JPEG files."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from harness import Measurement, Ratio, Table, interleaved, quotients
from matplotlib.figure import Figure
from photographs import HEIGHT, QUALITY, WIDTH, draw_photographs
from timm.data import create_dataset, create_loader

from hatnet_train.config import TrainConfig
from hatnet_train.data import loader, open_split
from hatnet_train.data.loader import train_batches
from hatnet_train.data.shard_writer import write_shards
from hatnet_train.recipes import build_config
from hatnet_train.sampler import GlobalOrder

RESIZE = 256
"""Short side in pixels of the pre-resized shards."""

WARM_UP = 3
"""Batches that each turn takes first: those that the worker prefetches, and one more."""

FOLDER, SHARDS, RESIZED = "our folder", "our shards", f"our shards, short side {RESIZE}"
TIMM, TIMM_FLOATS = "timm, bytes", "timm, floats"

WHAT = f"""One worker process makes batches of 224×224 images; this process only takes them. All sources hold the same
JPEG files of {WIDTH}×{HEIGHT} pixels, quality {QUALITY}, which lie in the page cache, so that what is measured is a
processor core and not a disk. "{TIMM}" is timm's loader as its prefetcher has it: bytes leave the worker,
normalisation and random erasing are left to the device. "{TIMM_FLOATS}" is `use_prefetcher=False`: the worker does
both. Our worker erases, draws what mixing needs, and hands over bytes; the device normalises. The targets are against
"{TIMM}", the faster one."""


@dataclass(frozen=True)
class Plan:
    """Extent of a measurement: images drawn, images per batch, batches per turn, rounds."""

    images: int = 2000
    batch_size: int = 50
    batches: int = 16
    rounds: int = 5


QUICK = Plan(images=200, batch_size=20, batches=4, rounds=3)


@dataclass(frozen=True)
class Places:
    """The same images three times: as a folder, as shards, as shards of smaller images."""

    folder: Path
    shards: Path
    resized: Path


def measure(args: argparse.Namespace) -> Measurement:
    """Draw the images, measure both sets of augmentations, and draw the rates."""
    plan = QUICK if args.quick else Plan()
    with TemporaryDirectory(prefix="hatnet-bench-") as scratch:
        places = Places(Path(scratch) / "images", Path(scratch) / "shards", Path(scratch) / "resized")
        size = draw_photographs(places.folder, plan.images)
        write_shards(places.folder, places.shards, splits=("train",))
        index = write_shards(places.folder, places.resized, splits=("train",), resize=RESIZE)
        smaller = sum(shard["bytes"] for shard in index["splits"]["train"]["shards"])
        result = Measurement("Loader", WHAT)
        result.settings = {
            "images": f"{plan.images}, {size / plan.images / 1e3:.0f} KB each; with short side {RESIZE} and "
            f"quality {index['made']['quality']}, {smaller / plan.images / 1e3:.0f} KB",
            "a turn": f"{plan.batches} batches of {plan.batch_size} after {WARM_UP} that do not count",
            "rounds": plan.rounds,
        }
        for name, config in augmentations(plan).items():
            _compare(name, config, places, plan, result)
    _draw(result, args.picture)
    return result


def augmentations(plan: Plan) -> dict[str, TrainConfig]:
    """Recipe ``imagenet`` with one worker: with what Sec. 4.1 names, and with all that DeiT has."""
    values = {"data": "-", "batch_size": plan.batch_size, "workers": 1, "repeats": 1}
    deit = build_config("imagenet", values)
    return {"crop and flip": deit.replace(rand_augment="", random_erasing=0.0), "DeiT": deit}


def _compare(name: str, config: TrainConfig, places: Places, plan: Plan, result: Measurement) -> None:
    """Add rates, processor times and ratios of one set of augmentations to ``result``."""
    makers: dict[str, Callable[[int], Iterable[Any]]] = {
        FOLDER: lambda seed: our_batches(config, places.folder, seed),
        SHARDS: lambda seed: our_batches(config, places.shards, seed),
        RESIZED: lambda seed: our_batches(config, places.resized, seed),
        TIMM: lambda seed: timm_batches(config, places.folder, seed, as_bytes=True),
        TIMM_FLOATS: lambda seed: timm_batches(config, places.folder, seed, as_bytes=False),
    }
    processor: dict[str, list[float]] = {maker: [] for maker in makers}

    def contender(maker: str) -> Callable[[int], float]:
        def turn(number: int) -> float:
            rate, milliseconds = rate_of(lambda: makers[maker](number), plan)
            processor[maker].append(milliseconds)
            return rate

        return turn

    rates = interleaved({maker: contender(maker) for maker in makers}, plan.rounds, f"loader, {name}")
    result.tables.append(Table(f"{name}: one worker", "images/s", rates))
    result.tables.append(Table(f"{name}: processor time of the worker", "ms an image", processor, digits=2))
    for ours, target in ((FOLDER, 1.0), (SHARDS, None), (RESIZED, 2.5)):
        against = f"{name}: {ours} / {TIMM}"
        result.ratios.append(Ratio(against, quotients(rates[ours], rates[TIMM]), at_least=target))
    result.ratios.append(Ratio(f"{name}: {FOLDER} / {TIMM_FLOATS}", quotients(rates[FOLDER], rates[TIMM_FLOATS])))


def our_batches(config: TrainConfig, data: Path, seed: int) -> Iterator[loader.Batch]:
    """Yield the batches of a training run of one process."""
    source = open_split(str(data), train=True, size=config.images.image_size)
    order = GlobalOrder(
        length=len(source), batch_size=config.optimisation.batch_size, seed=seed, repeats=config.augmentation.repeats
    )
    return train_batches(source, order, config.replace(seed=seed), rank=0, world_size=1)


def timm_batches(config: TrainConfig, data: Path, seed: int, *, as_bytes: bool) -> Iterable[Any]:
    """Yield the same from timm's loader, with the augmentations of ``config``.

    Args:
        config: the run.
        data: folder in ImageNet's layout.
        seed: of everything random.
        as_bytes: whether normalisation and random erasing are left to the device, as with timm's prefetcher.
    """
    torch.manual_seed(seed)  # timm's loader draws the seed of its workers and the order from here
    made = create_loader(
        create_dataset("", root=str(data), split="train", is_training=True),
        input_size=(3, config.images.image_size, config.images.image_size),
        batch_size=config.optimisation.batch_size,
        is_training=True,
        re_prob=config.augmentation.random_erasing,
        re_mode="pixel",
        scale=(config.augmentation.min_scale, 1.0),
        hflip=config.augmentation.hflip,
        color_jitter=None,
        auto_augment=config.augmentation.rand_augment or None,
        interpolation="bicubic",
        num_workers=config.images.workers,
        pin_memory=torch.cuda.is_available(),
        device=torch.device("cpu"),
        use_prefetcher=as_bytes,
    )
    return made.loader if as_bytes else made  # the prefetcher itself would normalise in this process


def rate_of(make: Callable[[], Iterable[Any]], plan: Plan) -> tuple[float, float]:
    """Images a second in the steady state, and milliseconds of the worker's processor time an image.

    A loader is made anew for every turn and ended after it, so that no other worker runs during a turn.
    """
    batches = make()
    iterator = iter(batches)
    for _ in range(WARM_UP):
        next(iterator)
    (worker,) = (psutil.Process(child.pid) for child in multiprocessing.active_children())
    busy, start = _processor_seconds(worker), time.perf_counter()
    for batch in islice(iterator, plan.batches):
        if len(batch[0]) != plan.batch_size:
            raise ValueError(f"a batch has {len(batch[0])} images, expected {plan.batch_size}")
    seconds = time.perf_counter() - start
    busy = _processor_seconds(worker) - busy
    del batches, iterator  # ends the worker
    images = plan.batches * plan.batch_size
    return images / seconds, 1e3 * busy / images


def _processor_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _draw(result: Measurement, path: Path) -> None:
    """Draw the rates as bars, with lowest and highest as whiskers."""
    tables = [table for table in result.tables if table.unit == "images/s"]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    plots = figure.subplots(1, len(tables), sharey=True)
    plots[0].invert_yaxis()  # the first contender on top, in all plots
    for axes, table in zip(plots, tables, strict=True):
        names = list(table.rounds)
        medians = [float(np.median(table.rounds[name])) for name in names]
        low = [median - min(table.rounds[name]) for name, median in zip(names, medians, strict=True)]
        high = [max(table.rounds[name]) - median for name, median in zip(names, medians, strict=True)]
        colors = ["tab:gray" if name.startswith("timm") else "tab:blue" for name in names]
        bars = axes.barh(names, medians, xerr=[low, high], color=colors, error_kw={"capsize": 3, "alpha": 0.6})
        axes.bar_label(bars, fmt="%.0f", label_type="center", color="white")
        axes.set(title=table.title, xlabel="images/s (median, lowest to highest)")
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=130)
