"""The command ``hatnet-export``: a checkpoint in, a file for another program out."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hatnet_core.__about__ import __version__

try:
    from tyro.conf import arg

    from hatnet_core.console import (
        Command,
        Flag,
        OptionalCheckpoint,
        UsageError,
        Variant,
        file_ending,
        pixels,
        run,
        say,
        writable_file,
    )
except ModuleNotFoundError as error:
    sys.exit(f"hatnet-export: error: {error}: pip install 'hatnet-core[cli]'")

if TYPE_CHECKING:
    from hatnet_core.model import HATNet

SUFFIXES = (".onnx", ".pt2", ".safetensors")
"""An ONNX graph, a ``torch.export`` program, or weights with their configuration."""

LARGEST_SIDE = 4096
"""Largest side in pixels of an image to trace with: the model runs on it, in several GiB of memory."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    r"""Write a HAT-Net as an ONNX graph (.onnx), a torch.export program (.pt2) or weights (.safetensors).

    Graphs and programs take any batch size, height and width. They are checked against the model, also at sizes
    that were not traced, before the file appears.

    Examples:
      hatnet-export --checkpoint runs/digits --out digits.onnx
      hatnet-export --checkpoint HAT-Net_Small.pth --variant hatnet_small \
          --out small.pt2
    """

    out: Annotated[Path, file_ending(*SUFFIXES)]
    """File to write; its suffix tells the format."""

    checkpoint: OptionalCheckpoint = None

    variant: Variant = None

    pretrained: Flag = False
    """Download the weights released with the paper, for --variant. Without this and --checkpoint, they are random."""

    key: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Take the weights of --checkpoint under this key or prefix, such as model_ema."""

    size: Annotated[
        tuple[int, int] | None, pixels(LARGEST_SIDE), arg(help_behavior_hint="(default: as trained, or 224)")
    ] = None
    """Height and width to trace with, in pixels, 32 to 4096; one number is both."""

    static: Flag = False
    """Take one image of exactly --size instead of any number of any size."""

    def run(self) -> None:
        """Export."""
        if self.checkpoint is None and self.variant is None:
            raise UsageError("one of --checkpoint and --variant is required")
        if self.pretrained and self.checkpoint is not None:
            raise UsageError("--pretrained cannot be combined with --checkpoint")
        if self.key is not None and self.checkpoint is None:
            raise UsageError(f"--key has an effect only with --checkpoint, got {self.key!r}")
        if self.out.suffix == ".safetensors":  # nothing is traced
            for name, given in (("--static", self.static or None), ("--size", self.size)):
                if given is not None:
                    raise UsageError(f"{name} has an effect only on .onnx and .pt2, got --out {self.out}")
        writable_file(self.out)
        self._export(self._model(), self._metadata())

    def _export(self, model: HATNet, metadata: dict[str, Any]) -> None:
        import torch

        from hatnet_core import export
        from hatnet_core.checkpoint import save_checkpoint, trained_size

        size = self.size or trained_size(self.checkpoint, LARGEST_SIDE)
        start = time.perf_counter()
        logger.info("exporting to %s ...", self.out)
        with tempfile.TemporaryDirectory(dir=self.out.parent, prefix=f".{self.out.name}.") as staging:
            staged = Path(staging) / self.out.name
            if self.out.suffix == ".safetensors":
                save_checkpoint(model, staged, metadata)
            elif self.out.suffix == ".onnx":
                export.export_onnx(model, staged, size, self.static)
            else:
                torch.export.save(export.export_program(model, size, self.static), staged)
            say(f"exported in {time.perf_counter() - start:.0f} s, {staged.stat().st_size / 1e6:.1f} MB")
            if self.out.suffix != ".safetensors":
                shapes = [(1, *size)] if self.static else export.check_shapes(size)
                difference = export.largest_difference(model, staged, shapes)
                inputs = ", ".join("×".join(map(str, (b, model.in_chans, h, w))) for b, h, w in shapes)
                say(f"largest difference to the model {difference:.1e} of the largest output, at inputs {inputs}")
                if not difference <= export.TOLERANCE:
                    raise ValueError(
                        f"{self.out} not written: its outputs differ by {difference:.1e}, at most {export.TOLERANCE}"
                    )
            staged.replace(self.out)
        say(f"wrote {self.out}")

    def _model(self) -> HATNet:
        from hatnet_core.checkpoint import load_model
        from hatnet_core.factory import create_model

        if self.checkpoint is not None:
            return load_model(self.checkpoint, self.variant, self.key)
        if not self.pretrained:
            logger.info("neither --checkpoint nor --pretrained: random weights")
        return create_model(self.variant or "", pretrained=self.pretrained)

    def _metadata(self) -> dict[str, Any]:
        """Metadata of the checkpoint that are not about its model, such as the class names."""
        from hatnet_core.checkpoint import find_metadata

        record = {} if self.checkpoint is None else find_metadata(self.checkpoint)
        return {name: value for name, value in record.items() if name not in ("version", "variant", "config")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    return run("hatnet-export", Export, arguments, version=__version__)


if __name__ == "__main__":
    sys.exit(main())
