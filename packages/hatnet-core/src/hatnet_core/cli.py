"""The command ``hatnet-export``: a checkpoint in, a file for another program out."""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatnet_core.__about__ import __version__
from hatnet_core.commands import (
    STATUSES,
    Parser,
    UsageError,
    add_checkpoint,
    add_size,
    add_variant,
    path_ending,
    say,
    writable_file,
)

if TYPE_CHECKING:
    from hatnet_core.model import HATNet

SUFFIXES = (".onnx", ".pt2", ".safetensors")
"""An ONNX graph, a ``torch.export`` program, or weights with their configuration."""

LARGEST_SIDE = 4096
"""Of an image to trace with, in pixels: the model runs on it, in several GiB of memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    return parser().run(_main, arguments)


def parser() -> Parser:
    """The options of ``hatnet-export``."""
    made = Parser(
        "hatnet-export",
        description="Write a HAT-Net as an ONNX graph (.onnx), a torch.export program (.pt2) or weights with their "
        "configuration (.safetensors). Graphs and programs take any batch size, height and width; they are checked "
        "against the model, at other sizes than the traced one, too, before the file appears.",
        epilog="examples:\n"
        "  hatnet-export --checkpoint runs/digits --out digits.onnx\n"
        "  hatnet-export --checkpoint HAT-Net_Small.pth --variant hatnet_small \\\n"
        f"      --size 224 --out small.pt2\n\n{STATUSES}",
        version=__version__,
    )
    add_checkpoint(made)
    add_variant(made, "; alone, one with random weights")
    made.add_argument(
        "--pretrained",
        action="store_true",
        help="with --variant: the weights released with the paper, which are downloaded",
    )
    made.add_argument(
        "--key",
        metavar="NAME",
        help="with --checkpoint: take the weights under this key or prefix of the file, such as model_ema",
    )
    add_size(made, None, LARGEST_SIDE, " (what is traced; default as trained, or 224)")
    made.add_argument("--static", action="store_true", help="take one image of exactly --size, instead of any")
    made.add_argument(
        "--out",
        type=path_ending(*SUFFIXES),
        required=True,
        metavar="FILE",
        help=f"write to this file; its ending says what: {', '.join(SUFFIXES)}",
    )
    return made


def _main(options: Namespace) -> None:
    if options.checkpoint is None and options.variant is None:
        raise UsageError("what is to be exported is missing: expected --checkpoint, --variant or both")
    if options.pretrained and options.checkpoint is not None:
        raise UsageError("--checkpoint and --pretrained are two sources of weights: expected one")
    if options.key is not None and options.checkpoint is None:
        raise UsageError("--key has an effect only on a file: expected --checkpoint")
    if options.out.suffix == ".safetensors":  # nothing is traced
        for name, given in (("--static", options.static or None), ("--size", options.size)):
            if given is not None:
                raise UsageError(f"{name} has an effect only on a graph or program, not on {options.out}")
    writable_file(options.out)
    _export(options, _model(options), _metadata(options))


def _export(options: Namespace, model: HATNet, metadata: dict[str, Any]) -> None:
    import torch

    from hatnet_core import export
    from hatnet_core.checkpoint import save_checkpoint, trained_size

    out, size = options.out, options.size or trained_size(options.checkpoint, LARGEST_SIDE)
    start = time.perf_counter()
    _progress(f"exporting to {out}")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as staging:
        staged = Path(staging) / out.name
        if out.suffix == ".safetensors":
            save_checkpoint(model, staged, metadata)
        elif out.suffix == ".onnx":
            export.export_onnx(model, staged, size, options.static)
        else:
            torch.export.save(export.export_program(model, size, options.static), staged)
        say(f"exported in {time.perf_counter() - start:.0f} s, {staged.stat().st_size / 1e6:.1f} MB")
        if out.suffix != ".safetensors":
            shapes = [(1, *size)] if options.static else export.check_shapes(size)
            difference = export.largest_difference(model, staged, shapes)
            inputs = ", ".join("×".join(map(str, (b, model.in_chans, h, w))) for b, h, w in shapes)
            say(f"largest difference to the model {difference:.1e} of the largest output, at inputs {inputs}")
            if not difference <= export.TOLERANCE:
                raise ValueError(
                    f"{out} not written: its outputs differ by {difference:.1e}, at most {export.TOLERANCE}"
                )
        staged.replace(out)
    say(f"wrote {out}")


def _model(options: Namespace) -> HATNet:
    from hatnet_core.checkpoint import load_model
    from hatnet_core.factory import create_model

    if options.checkpoint is not None:
        return load_model(options.checkpoint, options.variant, options.key)
    if not options.pretrained:
        _progress("neither --checkpoint nor --pretrained: random weights")
    return create_model(options.variant, pretrained=options.pretrained)


def _metadata(options: Namespace) -> dict[str, Any]:
    """What the checkpoint says beside its model, such as the class names."""
    from hatnet_core.checkpoint import find_metadata

    record = {} if options.checkpoint is None else find_metadata(options.checkpoint)
    return {name: value for name, value in record.items() if name not in ("version", "variant", "config")}


def _progress(text: str) -> None:
    sys.stderr.write(f"{text} ...\n")


if __name__ == "__main__":
    sys.exit(main())
