"""The time of a training step: our Trainer compared with DeepSpeed's own loop and PyTorch alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from harness import Measurement, Ratio, Table, interleaved, quotients
from training_steps import (
    PLAIN,
    PlainLoop,
    close,
    deepspeed_seconds,
    join_launch,
    make_trainer_in_memory,
    step_config,
    trainer_seconds,
)

from hatnet_train.trainer import Trainer

OURS, OURS_WHOLE = "our Trainer", "our Trainer, with mixing and average of the weights"
DEEPSPEED, PYTORCH = "DeepSpeed's own loop", "PyTorch alone"

TARGET = 1.03
"""Most that our loop may take of the time of DeepSpeed's own."""

WHAT = f"""One process, the same model and the same four batches in memory for all, one turn of each loop after the
other. "{OURS}" begins with bytes as the data workers hand them over: it normalises, trains, brings losses together and
reports them. "{DEEPSPEED}" is `engine(x)`, `engine.backward`, `engine.step` on the very same engine, "{PYTORCH}"
forward, backward and the fused AdamW on a copy of the model; both take images that are normalised beforehand.
"{OURS_WHOLE}" does what recipe `imagenet` does and the other loops do not. The wait for data is not counted; it is
next to none. What our loop takes outside of the engine's `forward`, `backward` and `step` is measured in the same
turns: on a busy machine it tells more than the ratios of whole steps. On a GPU it is what the processor takes."""


@dataclass(frozen=True)
class Plan:
    """Extent of a measurement: model, pixels, images per batch, steps per turn, rounds, precisions."""

    variant: str = "hatnet_tiny"
    image_size: int = 224
    batch_size: int = 8
    steps: int = 4
    rounds: int = 5
    precisions: tuple[str, ...] = ("fp32", "bf16")


QUICK = Plan(image_size=96, batch_size=4, steps=3, rounds=3)


def measure(args: argparse.Namespace) -> Measurement:
    """Measure all loops in every precision."""
    plan = QUICK if args.quick else Plan()
    join_launch()
    result = Measurement("Engine", WHAT)
    result.settings = {
        "model": f"{plan.variant} at {plan.image_size}×{plan.image_size}, batch {plan.batch_size}, ZeRO stage 0",
        "a turn": f"{plan.steps} steps",
        "rounds": f"{plan.rounds}, after one that does not count",
        "threads": torch.get_num_threads(),
    }
    for precision in plan.precisions:
        with TemporaryDirectory(prefix="hatnet-bench-") as scratch:
            _compare(precision, plan, Path(scratch), result)
    return result


def _compare(precision: str, plan: Plan, scratch: Path, result: Measurement) -> None:
    """Add times and ratios of one precision to ``result``."""
    values = {"variant": plan.variant, "image_size": plan.image_size, "batch_size": plan.batch_size}
    same = make_trainer_in_memory(step_config(**values, **PLAIN, precision=precision), scratch / "same", plan.steps)
    whole = make_trainer_in_memory(step_config(**values, precision=precision), scratch / "whole", plan.steps)
    alone = PlainLoop(same)
    outside: dict[str, list[float]] = {OURS: [], OURS_WHOLE: []}
    contenders: dict[str, Callable[[int], float]] = {
        OURS: lambda number: _ours(same, number, outside[OURS]),
        OURS_WHOLE: lambda number: _ours(whole, number, outside[OURS_WHOLE]),
        DEEPSPEED: lambda _: 1e3 * deepspeed_seconds(same),
        PYTORCH: lambda _: 1e3 * alone.seconds(),
    }
    times = interleaved(contenders, plan.rounds, f"engine, {precision}", warm_up=True)
    close(same, whole)
    result.tables.append(Table(f"{precision}: a step", "ms", times))
    result.tables.append(Table(f"{precision}: a step of ours, outside of DeepSpeed's engine", "ms", outside, digits=2))
    limits = [(OURS, DEEPSPEED, TARGET), (OURS, PYTORCH, None), (OURS_WHOLE, DEEPSPEED, None)]
    for above, below, target in [*limits, (DEEPSPEED, PYTORCH, None)]:
        name = f"{precision}: {above} / {below}"
        result.ratios.append(Ratio(name, quotients(times[above], times[below]), at_most=target))
    for name, milliseconds in outside.items():
        inside = [step - part for step, part in zip(times[name], milliseconds, strict=True)]
        ratio = Ratio(f"{precision}: {name}, outside / inside of the engine", quotients(milliseconds, inside))
        result.ratios.append(ratio)


def _ours(trainer: Trainer, number: int, outside: list[float]) -> float:
    """Milliseconds a step of our loop; those outside of the engine go to ``outside``, unless it is the warm-up."""
    with ExitStack() as stack:
        spent = [timed(stack, type(trainer.engine), name) for name in ("forward", "backward", "step")]
        seconds = trainer_seconds(trainer)
    if number >= 0:
        outside.append(1e3 * (seconds - sum(map(sum, spent)) / trainer.order.steps))
    return 1e3 * seconds


def timed(stack: ExitStack, kind: type, name: str) -> list[float]:
    """Record the seconds of every call of a method, as long as the stack is open."""
    seconds: list[float] = []
    method = getattr(kind, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    stack.enter_context(patch.object(kind, name, call))
    return seconds
