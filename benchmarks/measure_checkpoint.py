"""Checkpoints: the time to write, to check and to read ours, compared with DeepSpeed's own."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from harness import Measurement, Ratio, Table, interleaved, quotients
from training_steps import close, join_launch, make_trainer_in_memory, step_config, train_epoch

from hatnet_train import checkpoint
from hatnet_train.state import read_saved, restore
from hatnet_train.trainer import Trainer

WRITE, CHECK, READ = "ours: write", "ours: compare with the manifest", "ours: read and restore"
DEEPSPEED = "DeepSpeed's save_checkpoint"

WHAT = """One process trains a step and saves. "ours" is what `hatnet-train` does at the end of an epoch: weights,
their moving average and the optimizer's moments go into a hidden folder, every file is flushed to the disk and hashed,
then the folder is renamed. "DeepSpeed's save_checkpoint" of the very same engine writes weights and moments in place,
without an average, a hash or a flush. The folder is removed before each turn."""


@dataclass(frozen=True)
class Plan:
    """Extent of a measurement: models, rounds."""

    variants: tuple[str, ...] = ("hatnet_tiny", "hatnet_small", "hatnet_large")
    rounds: int = 5


QUICK = Plan(variants=("hatnet_tiny",), rounds=2)


def measure(args: argparse.Namespace) -> Measurement:
    """Measure all models."""
    plan = QUICK if args.quick else Plan()
    join_launch()
    result = Measurement("Checkpoints", WHAT)
    result.settings = {"rounds": f"{plan.rounds}, after one that does not count", "ZeRO stage": 0}
    for variant in plan.variants:
        with TemporaryDirectory(prefix="hatnet-bench-") as scratch:
            _measure(variant, plan, Path(scratch), result)
    return result


def _measure(variant: str, plan: Plan, scratch: Path, result: Measurement) -> None:
    """Add the times of one model to ``result``."""
    config = step_config(variant=variant, image_size=64, batch_size=4, precision="fp32")
    trainer = make_trainer_in_memory(config, scratch, 1)
    train_epoch(trainer, 0)
    folder = scratch / "checkpoints" / checkpoint.folder_name(1, evaluated=False)
    contenders: dict[str, Callable[[int], float]] = {
        WRITE: lambda _: _seconds(lambda: _write(trainer, folder)),
        CHECK: lambda _: _seconds(lambda: list(checkpoint.check(folder))),
        READ: lambda _: _seconds(lambda: restore(trainer.engine, trainer.ema, read_saved(folder))),
        DEEPSPEED: lambda _: _seconds(lambda: _write_deepspeed(trainer, scratch / "deepspeed")),
    }
    _write(trainer, folder)
    times = interleaved(contenders, plan.rounds, f"checkpoints, {variant}", warm_up=True)
    sizes = [sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) for root in (folder, scratch / "deepspeed")]
    result.settings[variant] = f"ours {sizes[0] / 1e6:.0f} MB, DeepSpeed's {sizes[1] / 1e6:.0f} MB"
    result.tables.append(Table(variant, "s", times, digits=2))
    result.ratios.append(Ratio(f"{variant}: {WRITE} / {DEEPSPEED}", quotients(times[WRITE], times[DEEPSPEED])))
    close(trainer)


def _write(trainer: Trainer, folder: Path) -> None:
    rmtree(folder, ignore_errors=True)
    trainer.save()


def _write_deepspeed(trainer: Trainer, folder: Path) -> None:
    rmtree(folder, ignore_errors=True)
    trainer.engine.save_checkpoint(str(folder))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
