"""The commands ``hatnet-train`` and ``hatnet-predict``: arguments in, one call, errors in one line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, get_type_hints

from hatnet_train.__about__ import __version__
from hatnet_train.config import RECIPES, TrainConfig, build_config

GRACE_SECONDS = 10.0


def train(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-train``; see its ``--help``."""
    parser = _Parser(
        "hatnet-train",
        "Train a HAT-Net with DeepSpeed: alone, or in every process that the deepspeed launcher starts.",
        "examples:\n"
        "  hatnet-train --recipe digits --out runs/digits\n"
        "  deepspeed --num_accelerators 2 --module hatnet_train --recipe digits --out runs/digits",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help=f"values to start from: {', '.join(RECIPES)}")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="run folder, new or empty")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    overrides = parser.add_argument_group("values over those of the recipe")
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind = kinds[field.name]
        given = ", ".join(
            f"{recipe}: {values[field.name]}" for recipe, values in RECIPES.items() if field.name in values
        )
        text = f"{field.metadata['help']} ({given or f'default {field.default}'})"
        flag = "--" + field.name.replace("_", "-")
        overrides.add_argument(
            flag, type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=text.replace("%", "%%")
        )
    options = vars(parser.parse_args(arguments))
    recipe, out, _ = options.pop("recipe"), options.pop("out"), options.pop("local_rank")

    def run() -> None:
        config = build_config(recipe, options)
        from hatnet_train.engine import train as train_run

        train_run(config, out)

    return _report_errors("hatnet-train", run)


def predict(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-predict``; see its ``--help``."""
    parser = _Parser(
        "hatnet-predict",
        "Classify image files with a checkpoint of hatnet-train.",
        "example:\n  hatnet-predict --checkpoint runs/digits/model.safetensors scan.png",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file, any format Pillow reads")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="FILE", help="model.safetensors of a run")
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="classes to show an image (default 1)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="output (default table)")
    options = parser.parse_args(arguments)

    def run() -> None:
        from hatnet_train.predict import predict as predict_images

        rows = predict_images(options.checkpoint, options.images, options.top_k)
        if options.format == "json":
            print(json.dumps(rows, indent=2))
            return
        for row in rows:
            ranked = zip(row["classes"], row["probabilities"], strict=True)
            print(f"{row['image']}  " + "  ".join(f"{name} {100 * p:.1f} %" for name, p in ranked))

    return _report_errors("hatnet-predict", run)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")

    def error(self, message: str) -> NoReturn:
        """Print the message alone, once a launch, and exit with 2."""
        _print_error(self.prog, f"{message} (see {self.prog} --help)")
        sys.exit(2)


def _report_errors(prog: str, run: Callable[[], None]) -> int:
    """Exit status of ``run``: 0, or 1 after one line on what went wrong."""
    try:
        run()
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        _print_error(prog, str(error))
        return 1
    except KeyboardInterrupt:
        _print_error(prog, "interrupted")
        return 130
    return 0


def _print_error(prog: str, message: str) -> None:
    """Report an error that usually every process of a launch meets, in one line.

    The launcher ends all processes soon after the first: the others leave rank 0 time to report, and speak only where
    it did not end, because the error was theirs alone.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(GRACE_SECONDS)
        print(f"{prog}: error: [rank {rank}] {message}", file=sys.stderr, flush=True)
