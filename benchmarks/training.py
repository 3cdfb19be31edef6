"""Measure training on this machine: data loading, the cost of our loop, checkpoints, two processes.

Writes OUT/<date>-training.json, a readable .md of the same name and, for the loader, a picture. Close all else that
runs: the ratios are formed within rounds, but a busy machine still spreads them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import measure_checkpoint
import measure_engine
import measure_loader
import measure_scaling
from report import Report
from results import Measurement
from training_steps import leave_launch

NAMES = ("loader", "engine", "checkpoint", "scaling")

PACKAGES = ("hatnet-core", "hatnet-train", "torch", "torchvision", "timm", "deepspeed", "pillow", "scikit-image")


def main() -> None:
    """Run the chosen measurements and write the report after each, so that none is lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chosen", nargs="*", metavar="MEASUREMENT", help=f"any of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a try of a few minutes, whose numbers mean nothing")
    args = parser.parse_args()
    if unknown := set(args.chosen) - set(NAMES):
        parser.error(f"no measurement {', '.join(sorted(unknown))}; expected any of {', '.join(NAMES)}")
    chosen = [name for name in NAMES if name in args.chosen] or list(NAMES)
    part = chosen if args.chosen else []
    report = Report(args.out, "training", part, PACKAGES, quick=args.quick)
    for name in chosen:
        report.add(name, measurements(report, quick=args.quick)[name])
    leave_launch()
    print(f"\nwrote {report.path('.json')} and {report.path('.md')}")


def measurements(report: Report, *, quick: bool) -> dict[str, Callable[[], Measurement]]:
    """Return the function of each measurement."""
    picture = report.path("-loader.png")
    return {
        "loader": lambda: measure_loader.measure(measure_loader.QUICK if quick else measure_loader.Plan(), picture),
        "engine": lambda: measure_engine.measure(measure_engine.QUICK if quick else measure_engine.Plan()),
        "checkpoint": lambda: measure_checkpoint.measure(
            measure_checkpoint.QUICK if quick else measure_checkpoint.Plan()
        ),
        "scaling": lambda: measure_scaling.measure(measure_scaling.QUICK if quick else measure_scaling.Plan()),
    }


if __name__ == "__main__":
    main()
