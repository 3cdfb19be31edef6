"""Measure the dense tasks on this machine: training from scratch on drawn shapes, and detectors compared with others.

Writes OUT/<date>-dense.json and a readable .md of the same name; pictures of the shapes go to PICTURES.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import measure_detectors
import measure_shapes
from report import Report

NAMES = ("shapes", "detectors")

PACKAGES = ("hatnet-core", "hatnet-dense", "torch", "mmengine", "mmcv", "mmdet", "mmsegmentation", "scikit-image")


def main() -> int:
    """Run the chosen measurements and write the report after each, so that none is lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chosen", nargs="*", metavar="MEASUREMENT", help=f"any of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--pictures", type=Path, default=Path("docs/images"), help="folder of the drawn shapes (default: %(default)s)"
    )
    args = parser.parse_args()
    if unknown := set(args.chosen) - set(NAMES):
        parser.error(f"no measurement {', '.join(sorted(unknown))}; expected any of {', '.join(NAMES)}")
    report = Report(args.out, "dense", args.chosen, PACKAGES)
    met = True
    for name in [name for name in NAMES if name in args.chosen] or NAMES:
        measure = {"shapes": lambda: measure_shapes.measure(args.pictures), "detectors": measure_detectors.measure}
        met &= all(ratio.met is not False for ratio in report.add(name, measure[name]).ratios)
    print(f"\nwrote {report.path('.json')} and {report.path('.md')}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
