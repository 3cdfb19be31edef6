"""The ``hatnet-analysis`` command: ``params`` and ``flops`` of the models by name.

Rows go to stdout, as a table for reading or as JSON for programs; on bad input one line goes to stderr and the exit
status is 2. The counting itself is in ``flops.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from tabulate import tabulate

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.flops import count_flops, count_params
from hatnet_core import create_model, list_models
from hatnet_core.model import MIN_SIZE

Row = dict[str, Any]

MAX_SIZE = 2**16
"""Largest height and width of an image in pixels; far beyond, the number of values is no longer an int64."""

COLUMNS = {
    "params": ("params (M)", 1e6),
    "flops_paper": ("FLOPs, paper (G)", 1e9),
    "flops_complete": ("FLOPs, complete (G)", 1e9),
}
"""Heading and unit of a column for reading; JSON has the plain name and the exact number."""

TABLE_FORMATS = {"table": "simple", "markdown": "github"}

FLOPS_DESCRIPTION = f"""\
Count the FLOPs of one image; one multiply-add is one FLOP. Two conventions stand side by side:

  paper     convolutions, linear layers and normalisations, as in Table 2 of the paper
  complete  these and the two matrix products of every attention

models: {", ".join(list_models())}"""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and ``message``, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the arguments behind the program's name; those of the process by default.

    Raises:
        SystemExit: with status 2 on bad input, 0 after ``--help`` and ``--version``.
    """
    parser = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        usage = " ".join(args.parser.format_usage().split()).removeprefix("usage: ")
        args.parser.error(f"unknown argument {unknown[0]!r}; expected {usage}")
    try:
        print(_render(args.rows(args), args.format))
    except ValueError as error:
        args.parser.error(str(error))


def params_rows(args: argparse.Namespace) -> list[Row]:
    """One row a model: its number of parameters."""
    with torch.device("meta"):  # shapes suffice
        return [{"model": name, "params": count_params(create_model(name))} for name in args.models]


def flops_rows(args: argparse.Namespace) -> list[Row]:
    """One row a model: its FLOPs in both conventions at the size asked for."""
    height, width = args.size
    rows = []
    for name in args.models:
        if sys.stderr.isatty():
            print(f"counting {name} at {height}×{width} ...", file=sys.stderr)
        try:
            total = count_flops(create_model(name), height, width).total
        except RuntimeError as error:  # torch has no narrower class for memory it cannot get
            reason = str(error).splitlines()[0]
            raise ValueError(f"cannot run {name} at {height}×{width}, expected a size that fits: {reason}") from error
        rows.append(
            {
                "model": name,
                "height": height,
                "width": width,
                "flops_paper": total.paper,
                "flops_complete": total.complete,
            }
        )
    return rows


def _parser() -> Parser:
    parser = Parser(
        prog="hatnet-analysis",
        description="Count parameters and FLOPs of the HAT-Net models.",
        epilog="'hatnet-analysis COMMAND --help' describes a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    params = commands.add_parser(
        "params",
        help="number of parameters",
        description=f"Count the parameters of models with 1000 classes.\n\nmodels: {', '.join(list_models())}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    params.set_defaults(rows=params_rows, parser=params)
    flops = commands.add_parser(
        "flops",
        help="FLOPs of one image, as the paper counts them and completely",
        description=FLOPS_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flops.set_defaults(rows=flops_rows, parser=flops)
    for command in (params, flops):
        command.add_argument("models", metavar="MODEL", nargs="+", type=_model, help="name of a model")
        command.add_argument(
            "--format", choices=("table", "json", "markdown"), default="table", help="output format (default: table)"
        )
    flops.add_argument(
        "--size",
        metavar=("H", "W"),
        nargs=2,
        type=_side,
        default=(224, 224),
        help=f"height and width of the image in pixels, {MIN_SIZE} to {MAX_SIZE} (default: 224 224)",
    )
    return parser


def _model(name: str) -> str:
    if name not in list_models(ablations=True):
        raise argparse.ArgumentTypeError(f"unknown model {name!r}; expected one of {', '.join(list_models())}")
    return name


def _side(text: str) -> int:
    if not text.isdecimal() or not MIN_SIZE <= int(text) <= MAX_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of pixels from {MIN_SIZE} to {MAX_SIZE}")
    return int(text)


def _render(rows: list[Row], style: str) -> str:
    if style == "json":
        return json.dumps(rows, indent=2)
    table = [dict(_readable(name, value) for name, value in row.items()) for row in rows]
    return tabulate(table, headers="keys", tablefmt=TABLE_FORMATS[style], floatfmt=".2f")


def _readable(name: str, value: Any) -> tuple[str, Any]:
    """Heading and value of one cell."""
    if name not in COLUMNS:
        return name, value
    heading, unit = COLUMNS[name]
    return heading, value / unit
