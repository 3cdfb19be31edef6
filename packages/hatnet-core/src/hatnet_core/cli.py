"""The command ``hatnet-export``: a checkpoint in, a file for another program out."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from hatnet_core.__about__ import __version__

try:
    from tyro.conf import Positional, arg

    from hatnet_core.console import (
        PATH,
        Command,
        Flag,
        OptionalCheckpoint,
        SomePath,
        UsageError,
        Variant,
        one_of,
        option,
        pixels,
        run,
        say,
        whole,
        writable_file,
        writable_folder,
    )
except ModuleNotFoundError as error:
    sys.exit(f"hatnet-export: error: {error}: pip install 'hatnet-core[cli]'")

if TYPE_CHECKING:
    from hatnet_core.export.deploy import Deployment

NAMES = {".onnx": "onnx", ".pt2": "program", ".safetensors": "safetensors", ".xml": "openvino"}
"""Format that a suffix of ``--out`` stands for."""

SUFFIXES = {name: suffix for suffix, name in NAMES.items()} | {"aotinductor": ".pt2"}
"""Suffix of the file of each format."""

TARGETS = ("huggingface", *SUFFIXES)
"""Names that ``--to`` takes."""

LARGEST_SIDE = 4096
"""Largest side in pixels of an image to trace with: the model runs on it, in several GiB of memory."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    r"""Write a HAT-Net for deployment: a file for another runtime, or a folder for Hugging Face and timm.

    Every file contains class names and preprocessing, and is loaded by its runtime and compared with the model
    before it appears. Graphs and programs take any batch size, height and width.

    Examples:
      hatnet-export runs/photos --out photos.onnx
      hatnet-export runs/photos --to huggingface --data photos --out photos-hf
      hatnet-export runs/photos --data photos --precision int8 --out photos.onnx
      hatnet-export runs/photos --data photos --compare --out deploy
    """

    source: Annotated[
        Positional[Path | None], PATH, arg(metavar="RUN|FILE", help_behavior_hint="", help="The same as --checkpoint.")
    ] = None

    out: SomePath
    """File to write, in .onnx, .pt2, .safetensors or .xml; with --to huggingface and --compare a folder."""

    to: Annotated[str | None, option(str, "NAME", one_of(TARGETS)), arg(help_behavior_hint="")] = None
    """onnx, openvino, program (torch.export), aotinductor, safetensors or huggingface; else as --out ends."""

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

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Of ONNX and OpenVINO. int8 is static and calibrated on images of --data."""

    opset: Annotated[int | None, whole(18, 30), arg(help_behavior_hint="(default: torch's)")] = None
    """Version of the operators of .onnx."""

    data: Annotated[Path | None, PATH, arg(help_behavior_hint="")] = None
    """Folder with val/CLASS/IMAGE, to measure accuracy on, and with train/ to calibrate int8 with."""

    calibration: Annotated[int, whole(1)] = 128
    """Number of images to calibrate int8 with."""

    compare: Flag = False
    """Write every format to the folder --out and print accuracy, size and speed on --data; also as compare.json."""

    def run(self) -> None:
        """Export."""
        checkpoint, name = self._checked()
        if self.compare or name == "huggingface":
            writable_folder(self.out)
        else:
            writable_file(self.out)
        deployment = self._deployment(checkpoint)
        if self.compare:
            self._compare(deployment)
        elif name == "huggingface":
            self._folder(deployment)
        else:
            self._file(deployment, name)

    def _checked(self) -> tuple[Path | None, str]:
        """Check the options against each other; return the checkpoint and the format."""
        if self.source is not None and self.checkpoint is not None:
            raise UsageError(f"--checkpoint must be omitted after {str(self.source)!r}, got {str(self.checkpoint)!r}")
        checkpoint = self.source or self.checkpoint
        if checkpoint is None and self.variant is None:
            raise UsageError("one of --checkpoint and --variant is required")
        if self.pretrained and checkpoint is not None:
            raise UsageError("--pretrained cannot be combined with --checkpoint")
        if self.key is not None and checkpoint is None:
            raise UsageError(f"--key has an effect only with --checkpoint, got {self.key!r}")
        name = "" if self.compare else self.to or NAMES.get(self.out.suffix, "")
        if self.compare and self.to is not None:
            raise UsageError(f"--to cannot be combined with --compare, got {self.to}")
        if not self.compare and (not name or self.out.suffix != SUFFIXES.get(name, self.out.suffix)):
            expected = f"end in {SUFFIXES[name]} with --to {name}" if name else f"end in one of {', '.join(NAMES)}"
            raise UsageError(f"--out must {expected}, got {str(self.out)!r}")
        self._check_effects(name)
        return checkpoint, name

    def _check_effects(self, name: str) -> None:
        graphs = [format for format in SUFFIXES if format != "safetensors"]
        effects = [
            ("--static", self.static or None, graphs),
            ("--size", self.size, graphs),
            ("--opset", self.opset, ["onnx"]),
            ("--precision", None if self.precision == "fp32" else self.precision, ["onnx", "openvino"]),
        ]
        for option, given, formats in effects:
            if given is not None and not (name in formats or (self.compare and option != "--precision")):
                raise UsageError(f"{option} has an effect only on {', '.join(formats)}, got --out {self.out}")
        if self.data is None and (self.precision == "int8" or self.compare):
            raise UsageError(f"--data is required by {'--compare' if self.compare else '--precision int8'}")

    def _deployment(self, checkpoint: Path | None) -> Deployment:
        from hatnet_core.export.deploy import Deployment, Request

        if checkpoint is None and not self.pretrained:
            logger.info("neither --checkpoint nor --pretrained: random weights")
        source = Request(checkpoint, self.variant, self.key, self.pretrained)
        size = self.size
        return Deployment.of(source, size, LARGEST_SIDE, self.static, self.opset, self.data, self.calibration)

    def _file(self, deployment: Deployment, name: str) -> None:
        logger.info("exporting to %s ...", self.out)
        with tempfile.TemporaryDirectory(dir=self.out.parent, prefix=f".{self.out.name}.") as staging:
            written = deployment.write(deployment.job(Path(staging)), name, self.precision, self.out.name)
            say(f"exported in {written.seconds:.0f} s, {written.bytes / 1e6:.1f} MB")
            say(deployment.check(written, self.out))
            written.move(self.out.parent)
        say(f"wrote {self.out}")

    def _folder(self, deployment: Deployment) -> None:
        from hatnet_core.export.huggingface import save_folder

        metadata = deployment.metadata
        if self.data is not None:
            metadata = {**metadata, "metrics": deployment.accuracy()}
            say(f"top-1 {metadata['metrics']['top1']:.2f} % of {metadata['metrics']['images']} images")
        save_folder(deployment.model, self.out, deployment.preprocessing, metadata)
        say(f"wrote {self.out}")

    def _compare(self, deployment: Deployment) -> None:
        from hatnet_core.export.compare import table
        from hatnet_core.io import atomic_write

        self.out.mkdir(parents=True, exist_ok=True)
        rows = deployment.compare(self.out, logger.info)
        with atomic_write(self.out / "compare.json") as part:
            part.write_text(json.dumps(rows, indent=2) + "\n")
        say(table(rows))
        say(f"wrote {self.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    return run("hatnet-export", Export, arguments, version=__version__)


if __name__ == "__main__":
    sys.exit(main())
