"""Measure the model's speed and memory on this machine: inference, training, high resolution, compared with its peers.

Writes OUT/<date>-core.json and a readable .md. Close all else that runs. With --against, ratios are compared with
those of an earlier report, and the program fails where one has lost more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from contenders import Plan
from measure_deployment import measure_deployment
from measure_inference import measure_bfloat16, measure_inference, measure_resolution, measure_variants
from measure_parts import measure_parts
from measure_steps import measure_steps
from report import Report
from results import Measurement

PACKAGES = ("hatnet-core", "torch", "timm")

MEASUREMENTS: dict[str, Callable[[Plan], Measurement]] = {
    "inference": measure_inference,
    "variants": measure_variants,
    "bfloat16": measure_bfloat16,
    "training": measure_steps,
    "parts": measure_parts,
    "resolution": measure_resolution,
    "deployment": measure_deployment,
}

LOSS = 0.15
"""How much smaller than recorded a ratio may be."""


def main() -> int:
    """Run the chosen measurements; 1 if a ratio has fallen behind the report it is compared with."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chosen", nargs="*", metavar="MEASUREMENT", help=f"any of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--against", metavar="FILE", type=Path, help="a report, .json, whose ratios must be kept")
    args = parser.parse_args()
    if unknown := set(args.chosen) - set(MEASUREMENTS):
        parser.error(f"no measurement {sorted(unknown)[0]}; expected any of {', '.join(MEASUREMENTS)}")
    if args.against is not None and not args.against.is_file():
        parser.error(f"no report {args.against}")
    chosen = [name for name in MEASUREMENTS if name in args.chosen] or list(MEASUREMENTS)
    report = Report(args.out, "core", chosen if args.chosen else [], PACKAGES)
    plan = Plan(rounds=args.rounds)
    measured = {name: report.add(name, partial(_in_fresh_process, MEASUREMENTS[name], plan)) for name in chosen}
    print(f"\nwrote {report.path('.json')} and {report.path('.md')}")
    return 0 if args.against is None else _behind(measured, json.loads(args.against.read_text(encoding="utf-8")))


def _in_fresh_process(measure: Callable[[Plan], Measurement], plan: Plan) -> Measurement:
    """Measure in a process of its own: what ran before changes the allocator, and so the speed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, plan).result()


def _behind(measured: Mapping[str, Measurement], recorded: dict[str, Any]) -> int:
    """Print every ratio next to the recorded one; 1 if one lost too much, or is not recorded."""
    failed = False
    for name, measurement in measured.items():
        before = {ratio["name"]: ratio["median"] for ratio in recorded["measurements"].get(name, {}).get("ratios", [])}
        for ratio in measurement.ratios:
            if ratio.name not in before:
                print(f"NOT RECORDED: {ratio.name}; expected one of the ratios of {name} in the report")
                failed = True
                continue
            now, then = statistics.median(ratio.rounds), before[ratio.name]
            lost = 1 - (then / now if ratio.at_most is not None else now / then)  # of memory, less is more
            failed |= lost > LOSS
            print(f"{'BEHIND' if lost > LOSS else 'kept'}: {ratio.name}: {now:.3f}, recorded {then:.3f}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
