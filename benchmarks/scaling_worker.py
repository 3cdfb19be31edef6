"""One process of the scaling measurement, on one core; ``measure_scaling.py`` has DeepSpeed's launcher start it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from deepspeed import comm as dist
from training_steps import (
    PLAIN,
    PlainLoop,
    close,
    join_launch,
    leave_launch,
    make_trainer_in_memory,
    step_config,
    trainer_seconds,
)


def main() -> None:
    """Measure this launch; rank 0 writes the rates of all processes together, in images per second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", required=True)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", required=True, help="images per step, over all processes"
    )
    parser.add_argument("--steps", type=int, required=True, help="steps a turn")
    parser.add_argument("--turns", type=int, required=True, help="turns of each loop, after one that does not count")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--local_rank", type=int, required=True, help="from the launcher: which core to take")
    args = parser.parse_args()
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[args.local_rank]})
    join_launch()
    with TemporaryDirectory(prefix="hatnet-bench-") as scratch:
        rates = measure(args, Path(scratch))
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(rates))
    leave_launch()


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, list[float]]:
    """Rates by loop, one a turn: our Trainer at each batch size (``16``), PyTorch alone at the last (``alone``)."""
    values = {"variant": args.variant, "image_size": args.image_size, "precision": "fp32", **PLAIN}
    configs = [step_config(**values, batch_size=size) for size in args.batch_sizes]
    trainers = [make_trainer_in_memory(it, scratch / f"{it.optimisation.batch_size}", args.steps) for it in configs]
    loops: dict[str, tuple[int, Callable[[], float]]] = {
        str(it.config.optimisation.batch_size): (it.config.optimisation.batch_size, partial(trainer_seconds, it))
        for it in trainers
    }
    loops["alone"] = (args.batch_sizes[-1], PlainLoop(trainers[-1]).seconds)
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(-1, args.turns):
        for name, (images, seconds) in loops.items():
            dist.barrier()
            rate = torch.tensor(images / dist.get_world_size() / seconds(), dtype=torch.float64)
            dist.all_reduce(rate)
            if turn >= 0:
                rates[name].append(float(rate))
    close(*trainers)
    return rates


if __name__ == "__main__":
    main()
