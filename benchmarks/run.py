"""Measure a subject on this machine and write OUT/<date>-<subject>.json.

Subjects and their measurements:
  core      inference, variants, bfloat16, training, parts, resolution, deployment
  training  loader, engine, checkpoint, scaling
  dense     shapes, detectors
  analysis  paper, growth, compare

Close everything else that runs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from harness import Measurement, Report

SUBJECTS = {
    "core": {
        "inference": "measure_inference:measure_inference",
        "variants": "measure_inference:measure_variants",
        "bfloat16": "measure_inference:measure_bfloat16",
        "training": "measure_steps:measure_steps",
        "parts": "measure_parts:measure_parts",
        "resolution": "measure_inference:measure_resolution",
        "deployment": "measure_deployment:measure_deployment",
    },
    "training": {
        "loader": "measure_loader:measure",
        "engine": "measure_engine:measure",
        "checkpoint": "measure_checkpoint:measure",
        "scaling": "measure_scaling:measure",
    },
    "dense": {"shapes": "measure_shapes:measure", "detectors": "measure_detectors:measure"},
    "analysis": {
        "paper": "measure_analysis:measure_paper",
        "growth": "measure_analysis:measure_growth",
        "compare": "measure_analysis:measure_compare",
    },
}
"""Functions of each subject's measurements; each takes the parsed arguments, and runs in a process of its own."""

PACKAGES = {
    "core": ("hatnet-core", "torch", "timm"),
    "training": ("hatnet-core", "hatnet-train", "torch", "torchvision", "timm", "deepspeed", "pillow"),
    "dense": ("hatnet-core", "hatnet-dense", "torch", "mmengine", "mmcv", "mmdet", "mmsegmentation"),
    "analysis": ("hatnet-core", "hatnet-analysis", "torch", "timm", "fvcore"),
}

LOSS = 0.15
"""Largest loss of a recorded ratio that ``--against`` accepts."""


def main() -> int:
    """Run the chosen measurements; 1 if one misses a figure that it must reach, or falls behind a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("chosen", nargs="*", metavar="MEASUREMENT", help="some of the subject's (default: all)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender of core (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="smoke run of training; its numbers mean nothing")
    parser.add_argument("--against", metavar="FILE", type=Path, help="report whose ratios must be kept to 15 %%")
    args = parser.parse_args()
    known = SUBJECTS[args.subject]
    if unknown := [name for name in args.chosen if name not in known]:
        parser.error(f"MEASUREMENT must be one of {', '.join(known)}, got {unknown[0]!r}")
    if args.against is not None and not args.against.is_file():
        parser.error(f"--against must be an existing report, got {str(args.against)!r}")
    report = Report(args.out, args.subject, args.chosen, PACKAGES[args.subject], quick=args.quick)
    args.picture = report.file.with_suffix(".png")
    measured = {name: report.add(name, partial(measure, known[name], args)) for name in args.chosen or known}
    print(f"wrote {report.file}")
    if args.against is not None:
        return behind(measured, json.loads(args.against.read_text(encoding="utf-8")))
    must = [ratio for measurement in measured.values() for ratio in measurement.ratios if args.subject == "dense"]
    return int(any(ratio.met is False for ratio in must))


def measure(address: str, args: argparse.Namespace) -> Measurement:
    """Run a measurement in a process of its own: what ran before changes the allocator, and so the speed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(call, address, args).result()


def call(address: str, args: argparse.Namespace) -> Measurement:
    """Import and call the function at ``module:name``."""
    module, _, name = address.partition(":")
    function: Callable[[argparse.Namespace], Measurement] = getattr(importlib.import_module(module), name)
    return function(args)


def behind(measured: Mapping[str, Measurement], recorded: dict[str, Any]) -> int:
    """Print every ratio next to the recorded one; 1 if one lost too much, or is not recorded."""
    failed = False
    for name, measurement in measured.items():
        before = {ratio["name"]: ratio["median"] for ratio in recorded["measurements"].get(name, {}).get("ratios", [])}
        for ratio in measurement.ratios:
            if ratio.name not in before:
                print(f"NOT RECORDED: {ratio.name}")
                failed = True
                continue
            now, then = statistics.median(ratio.rounds), before[ratio.name]
            lost = 1 - (then / now if ratio.at_most is not None else now / then)  # of memory, less is more
            failed |= lost > LOSS
            print(f"{'BEHIND' if lost > LOSS else 'kept'}: {ratio.name}: {now:.3f}, recorded {then:.3f}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
