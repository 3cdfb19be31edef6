"""The measurements of hatnet-analysis: the paper's tables, growth of attention, speed of peers."""

from __future__ import annotations

import argparse
import sys

from harness import Measurement

from hatnet_analysis.figures import compare_figure, growth_figure, save_figure
from hatnet_analysis.growth import crossings, exponents, growth
from hatnet_analysis.paper import table_rows
from hatnet_analysis.tables import TABLES
from hatnet_analysis.throughput import COMPARED, Settings, compare


def measure_paper(_: argparse.Namespace) -> Measurement:
    """Count what the paper's tables print."""
    rows = [row for table in TABLES for row in table_rows(table, _progress)]
    return Measurement("Tables of the paper", "", rows={"tables": rows})


def measure_growth(args: argparse.Namespace) -> Measurement:
    """Measure four attentions as images grow."""
    rows = growth(progress=_progress)
    save_figure(growth_figure(rows), args.picture.with_stem(f"{args.picture.stem}-growth"))
    results = {"growth": rows, "exponents": exponents(rows), "crossings": crossings(rows)}
    return Measurement("Growth of attention", "", rows=results)


def measure_compare(args: argparse.Namespace) -> Measurement:
    """Measure HAT-Net and its peers."""
    rows = compare(COMPARED, Settings(), _progress)
    save_figure(compare_figure(rows), args.picture.with_stem(f"{args.picture.stem}-compare"))
    return Measurement("Speed, FLOPs and top-1", "", rows={"models": rows})


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)
