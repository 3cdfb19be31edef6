"""Training on a GPU: images a second, and the share of the time that goes into waiting for pre-resized shards."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from photographs import draw_photographs
from results import Measurement, Table
from tqdm import trange
from training_steps import close, join_launch, make_trainer, make_trainer_in_memory, step_config, train_epoch

from hatnet_train.data import open_split
from hatnet_train.data.shard_writer import write_shards

WHAT = """One GPU trains with all that recipe `imagenet` does. "Batches in memory" is what the GPU can do; "pre-resized
shards" (short side 256) is a run with data workers on the cores of this machine, and its wait for data the share of
the time in which the GPU's process had no batch. All epochs follow each other without a pause; the first does not
count."""

MEMORY, SHARDS = "batches in memory", "pre-resized shards"


@dataclass(frozen=True)
class Plan:
    """How much is measured: model, images a batch, images drawn, steps a turn in memory, rounds, device."""

    variant: str = "hatnet_small"
    image_size: int = 224
    batch_size: int = 128
    images: int = 5120
    steps: int = 40
    rounds: int = 5
    device: str = "cuda"


QUICK = Plan(images=1280, steps=10, rounds=2)


def measure(plan: Plan) -> Measurement:
    """Measure, if there is a GPU."""
    result = Measurement("GPU", " ".join(WHAT.split()))
    if plan.device == "cuda" and not torch.cuda.is_available():
        result.not_measured = "no GPU"
        return result
    join_launch()
    workers = len(os.sched_getaffinity(0))
    result.settings = {
        "model": f"{plan.variant} at {plan.image_size}×{plan.image_size}, batch {plan.batch_size}, bf16, ZeRO stage 0",
        "shards": f"{plan.images} images, {workers} data workers",
        "rounds": f"{plan.rounds}, after one that does not count",
    }
    with TemporaryDirectory(prefix="hatnet-bench-") as scratch:
        _measure(plan, workers, Path(scratch), result)
    return result


def _measure(plan: Plan, workers: int, scratch: Path, result: Measurement) -> None:
    draw_photographs(scratch / "images", plan.images)
    write_shards(scratch / "images", scratch / "shards", splits=("train",), resize=256, workers=workers)
    source = open_split(str(scratch / "shards"), train=True, size=plan.image_size)
    config = step_config(variant=plan.variant, image_size=plan.image_size, batch_size=plan.batch_size)
    trainers = {
        MEMORY: make_trainer_in_memory(config, scratch / "memory", plan.steps),
        SHARDS: make_trainer(replace(config, workers=workers), scratch / "run", source),
    }
    rates: dict[str, list[float]] = {}
    waits: dict[str, list[float]] = {}
    for name, trainer in trainers.items():
        # one after the other: in a pause the data workers would get ahead, and hide how long a batch takes
        rows = [train_epoch(trainer, epoch) for epoch in trange(1 + plan.rounds, desc=f"GPU, {name}", unit="epoch")]
        rates[name] = [row["images_per_second"] for row in rows[1:]]
        waits[name] = [100 * row["data_wait"] for row in rows[1:]]
    close(*trainers.values())
    result.tables.append(Table("training", "images/s", rates, digits=0))
    result.tables.append(Table("wait for data", "% of the time", waits))
