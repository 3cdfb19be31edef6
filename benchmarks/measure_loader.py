"""Images a second that one data worker makes: our three sources beside timm's loader on the same JPEG files."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from photographs import HEIGHT, QUALITY, WIDTH, draw_photographs
from results import Measurement, Ratio, Table, interleaved, quotients, timed
from timm.data import create_dataset, create_loader

from hatnet_train.config import TrainConfig
from hatnet_train.data import augment, folder, loader, open_split, shards
from hatnet_train.data.loader import train_batches
from hatnet_train.data.order import GlobalOrder
from hatnet_train.data.shard_writer import write_shards
from hatnet_train.recipes import build_config

RESIZE = 256
"""Short side in pixels of the pre-resized shards."""

WARM_UP = 3
"""Batches that each turn takes first: those that the worker prefetches, and one more."""

STAGES = {
    "read": [(folder.Folder, "encoded"), (shards.Shards, "encoded")],
    "decode": [(folder, "decode"), (shards, "decode")],
    "crop and resize": [(augment.TrainTransform, "_crop")],
    "to Pillow and back": [(augment, "to_pillow"), (augment, "to_tensor")],
    "RandAugment": [(augment.RandAugment, "__call__")],
    "random erasing": [(augment.TrainTransform, "_erased")],
    "draws of mixing": [(loader, "draw_mixing")],
}
"""The functions of our loader that take time, by stage."""

REST, ALL = "seeding, flip, making the batch", "all"

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
    """How much is measured: images drawn, images a batch, batches a turn, rounds, images of the breakdown."""

    images: int = 2000
    batch_size: int = 50
    batches: int = 16
    rounds: int = 5
    breakdown: int = 400


QUICK = Plan(images=200, batch_size=20, batches=4, rounds=3, breakdown=60)


@dataclass(frozen=True)
class Places:
    """The same images three times: as a folder, as shards, as shards of smaller images."""

    folder: Path
    shards: Path
    resized: Path


def measure(plan: Plan, picture: Path) -> Measurement:
    """Draw the images, measure both sets of augmentations, and draw ``picture``."""
    with TemporaryDirectory(prefix="hatnet-bench-") as scratch:
        places = Places(Path(scratch) / "images", Path(scratch) / "shards", Path(scratch) / "resized")
        size = draw_photographs(places.folder, plan.images)
        write_shards(places.folder, places.shards, splits=("train",))
        index = write_shards(places.folder, places.resized, splits=("train",), resize=RESIZE)
        smaller = sum(shard["bytes"] for shard in index["splits"]["train"]["shards"])
        result = Measurement("Loader", " ".join(WHAT.split()))
        result.settings = {
            "images": f"{plan.images}, {size / plan.images / 1e3:.0f} KB each; with short side {RESIZE} and "
            f"quality {index['made']['quality']}, {smaller / plan.images / 1e3:.0f} KB",
            "a turn": f"{plan.batches} batches of {plan.batch_size} after {WARM_UP} that do not count",
            "rounds": plan.rounds,
        }
        for name, config in augmentations(plan).items():
            _compare(name, config, places, plan, result)
        for name, config in augmentations(plan).items():
            result.tables.append(_breakdown_table(name, config, places, plan))
    _draw(result, picture)
    return result


def augmentations(plan: Plan) -> dict[str, TrainConfig]:
    """Recipe ``imagenet`` with one worker: with what Sec. 4.1 names, and with all that DeiT has."""
    values = {"data": "-", "batch_size": plan.batch_size, "workers": 1, "repeats": 1}
    deit = build_config("imagenet", values)
    return {"crop and flip": replace(deit, rand_augment="", random_erasing=0.0), "DeiT": deit}


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
    """What the training run would see, for one process."""
    source = open_split(str(data), train=True, size=config.images.image_size)
    order = GlobalOrder(
        length=len(source), batch_size=config.optimisation.batch_size, seed=seed, repeats=config.augmentation.repeats
    )
    return train_batches(source, order, replace(config, seed=seed), rank=0, world_size=1)


def timm_batches(config: TrainConfig, data: Path, seed: int, *, as_bytes: bool) -> Iterable[Any]:
    """The same from timm's loader, with the augmentations of ``config``.

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


def _breakdown_table(name: str, config: TrainConfig, places: Places, plan: Plan) -> Table:
    """Where the processor time of an image goes, from folder and pre-resized shards, in this process on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kinds = {"folder": places.folder, "resized": places.resized}
    rounds: dict[str, list[float]] = {f"{kind}: {stage}": [] for kind in kinds for stage in (*STAGES, REST, ALL)}
    for number in range(plan.rounds):
        for kind, place in kinds.items():
            for stage, milliseconds in _breakdown(config, place, plan, number).items():
                rounds[f"{kind}: {stage}"].append(milliseconds)
    torch.set_num_threads(threads)
    used = {stage: values for stage, values in rounds.items() if max(values) > 0}
    return Table(f"{name}: where the processor time goes, without a worker", "ms an image", used, digits=3)


def _breakdown(config: TrainConfig, data: Path, plan: Plan, seed: int) -> dict[str, float]:
    """Milliseconds of processor time an image of every stage, of the rest, and of all."""
    spent = dict.fromkeys(STAGES, 0.0)
    batches = our_batches(replace(config, workers=0), data, seed)
    next(batches)
    count = -(-plan.breakdown // plan.batch_size)
    with timed(STAGES, spent, time.thread_time):
        start = time.thread_time()
        for _ in range(count):
            next(batches)
        everything = time.thread_time() - start
    images = count * plan.batch_size
    spent |= {REST: everything - sum(spent.values()), ALL: everything}
    return {stage: 1e3 * seconds / images for stage, seconds in spent.items()}


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
