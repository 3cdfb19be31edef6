"""Work of ``hatnet-export``: read a model with its preprocessing, write files, check and compare them."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hatnet_core import export
from hatnet_core.__about__ import __version__
from hatnet_core.checkpoint.loading import load_model
from hatnet_core.checkpoint.matching import variant_name
from hatnet_core.checkpoint.reading import find_metadata, trained_size
from hatnet_core.checkpoint.saving import saved_config
from hatnet_core.export.compare import BATCH, Labelled, calibration, held_out, logits_of, measure
from hatnet_core.export.formats import DESCRIPTION, FORMATS, Format, Job, Runner
from hatnet_core.factory import create_model
from hatnet_core.model import HATNet
from hatnet_core.preprocessing import Preprocessing


@dataclass(frozen=True)
class Request:
    """The model to export: a checkpoint, or a variant with released or random weights."""

    checkpoint: Path | None
    variant: str | None
    key: str | None
    pretrained: bool

    def load(self) -> HATNet:
        """Read or build the model, in evaluation mode."""
        if self.checkpoint is not None:
            return load_model(self.checkpoint, self.variant, self.key).eval()
        return create_model(self.variant or "", pretrained=self.pretrained).eval()

    def metadata(self) -> dict[str, Any]:
        """Metadata of the checkpoint that are not about its model, such as the class names."""
        record = {} if self.checkpoint is None else find_metadata(self.checkpoint)
        return {name: value for name, value in record.items() if name not in ("version", "variant", "config")}


@dataclass(frozen=True)
class Written:
    """A file in a folder for work in progress, and what belongs to it."""

    name: str
    precision: str
    path: Path
    seconds: float

    @property
    def format(self) -> Format:
        """Its format."""
        return FORMATS[self.name][self.precision]

    @property
    def parts(self) -> list[Path]:
        """The file last, so that its weights are there once it is: OpenVINO has two files."""
        weights = self.path.with_suffix(".bin")
        return [*([weights] if self.path.suffix == ".xml" else []), self.path]

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(part.stat().st_size for part in self.parts)

    def move(self, folder: Path) -> None:
        """Move the description and the files to ``folder``."""
        for part in (self.path.with_name(self.path.name + DESCRIPTION), *self.parts):
            part.replace(folder / part.name)


@dataclass(frozen=True)
class Deployment:
    """A model with its preprocessing, to be written in one or several formats."""

    model: HATNet
    metadata: dict[str, Any]
    preprocessing: Preprocessing
    size: tuple[int, int]
    static: bool
    opset: int | None
    data: Path | None
    calibration: int

    @classmethod
    def of(
        cls,
        source: Request,
        size: tuple[int, int] | None,
        largest: int,
        static: bool,
        opset: int | None,
        data: Path | None,
        calibration: int,
    ) -> Deployment:
        """Read the model and find the images, so that bad input ends before the work.

        Raises:
            ValueError: if the preprocessing is not valid or the images do not fit it; names the file or folder.
        """
        size = size or trained_size(source.checkpoint, largest)
        model, metadata = source.load(), source.metadata()
        try:
            preprocessing = Preprocessing.of(metadata, saved_config(model))
        except ValueError as error:
            raise ValueError(f"{source.checkpoint}: {error}") from None
        if static and size[0] == size[1]:  # the file takes no other
            preprocessing = dataclasses.replace(preprocessing, image_size=size[0])
        elif static and data is not None:
            raise ValueError(f"size must be one number with images to measure on, got {size[0]}×{size[1]}")
        found = cls(model, metadata, preprocessing, size, static, opset, data, calibration)
        if data is not None:
            found.expected  # noqa: B018  reads every image
        return found

    def _data(self) -> Path:
        if self.data is None:
            raise ValueError("data must be a folder of images, got None")
        return self.data

    @functools.cached_property
    def held_out(self) -> Labelled:
        """The images to measure with."""
        return held_out(self._data(), self.preprocessing.classes)

    @functools.cached_property
    def expected(self) -> Tensor:
        """Logits of the model for them."""
        return logits_of(self.model, self._batches())[0]

    def _batches(self) -> Iterator[Tensor]:
        return self.held_out.batches(self.preprocessing, 1 if self.static else BATCH)

    def measure(self, run: Runner) -> dict[str, Any]:
        """Measure an opened file on the images of ``data``."""
        return measure(run, self._batches(), self.held_out.labels, self.expected)

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """Content of the JSON in and next to every file."""
        config = saved_config(self.model)
        height, width = self.size if self.static else ("height", "width")
        return {
            **self.metadata,
            "version": __version__,
            "variant": variant_name(config),
            "config": dict(config),
            **self.preprocessing.to_dict(),
            "input": [1 if self.static else "batch", config.in_chans, height, width],
        }

    @functools.cached_property
    def calibration_images(self) -> Tensor:
        """Inputs to calibrate int8 with."""
        chosen = calibration(self._data(), self.preprocessing.classes, self.calibration)
        return next(chosen.batches(self.preprocessing, self.calibration))

    def job(self, folder: Path) -> Job:
        """Prepare to write files to a folder for work in progress."""
        return Job(
            model=self.model,
            size=self.size,
            static=self.static,
            metadata=self.metadata,
            description=self.description,
            folder=folder,
            opset=self.opset,
            images=lambda: self.calibration_images,
        )

    def write(self, job: Job, name: str, precision: str, file: str) -> Written:
        """Write one format to the folder of ``job``.

        Raises:
            ImportError: if a package is not installed.
        """
        kind, path = FORMATS[name][precision], job.folder / file
        if problem := kind.missing():
            raise ImportError(f"{name} {problem}")
        start = time.perf_counter()
        kind.write(job, path)
        path.with_name(path.name + DESCRIPTION).write_text(job.text + "\n")
        return Written(name, precision, path, time.perf_counter() - start)

    def check(self, written: Written, out: Path) -> str:
        """Compare a file with the model, on random images of several sizes and on those of ``data``.

        Args:
            written: the file.
            out: the file to become, for the error.

        Raises:
            ValueError: if the outputs differ by more than the format allows.
        """
        lines, run = [], written.format.open(written.path)
        if (limit := written.format.tolerance) is not None and written.format.traced:
            limit = export.TOLERANCE if limit == export.graphs.TOLERANCE else limit
            shapes = [(1, *self.size)] if self.static else export.check_shapes(self.size)
            difference = export.largest_difference(self.model, written.path, shapes, run)
            inputs = ", ".join("×".join(map(str, (b, self.model.in_chans, h, w))) for b, h, w in shapes)
            lines.append(f"largest difference to the model {difference:.1e} of the largest output, at inputs {inputs}")
            if not difference <= limit:
                raise ValueError(f"{out} not written: its outputs differ by {difference:.1e}, at most {limit}")
        if self.data is not None:
            row = self.measure(run)
            lines.append(
                f"top-1 {row['top1']:.2f} % of {row['images']} images, the class of the model in "
                f"{row['agreement']:.2f} %, {row['images_per_second']:.0f} images/s"
            )
        return "\n".join(lines)

    def accuracy(self) -> dict[str, Any]:
        """Top-1 of the model in percent on the images of ``data``, and their number."""
        right = self.expected.argmax(1) == self.held_out.labels
        return {"top1": 100 * right.double().mean().item(), "images": len(right)}

    def compare(self, folder: Path, progress: Callable[[str], object]) -> list[dict[str, Any]]:
        """Write every format to ``folder``, measure it, and return one row per format.

        A format whose packages are missing has a row with ``skipped``, the reason.
        """
        rows = []
        with tempfile.TemporaryDirectory(dir=folder, prefix=".exporting.") as staging:
            job = self.job(Path(staging))
            for name, precision in [(n, p) for n, precisions in FORMATS.items() for p in precisions]:
                row: dict[str, Any] = {"format": name, "precision": precision}
                rows.append(row)
                if problem := FORMATS[name][precision].missing():
                    row["skipped"] = problem
                    continue
                progress(f"{name} {precision} ...")
                stem = name if precision == "fp32" else f"{name}-{precision}"
                written = self.write(job, name, precision, stem + FORMATS[name][precision].suffix)
                run = written.format.open(written.path)
                row |= {"file": written.path.name, "bytes": written.bytes, "seconds_to_write": written.seconds}
                row |= self.measure(run)
                written.move(folder)
        return rows
