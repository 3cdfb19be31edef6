"""The command hatnet-predict."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from hatnet_core.console import (
    BadImages,
    Batch,
    Checkpoint,
    Command,
    Device,
    Format,
    UsageError,
    Variant,
    file_ending,
    option,
    say,
    several,
    whole,
    writable_file,
)
from hatnet_core.variants import MIN_SIZE
from hatnet_train.config import MAX_SIZE

logger = logging.getLogger(__name__)

STDIN = Path("-")
"""Stands for the names of images on standard input, one per line."""


def _image(word: str) -> Path:
    if not word:
        raise ValueError("expected a path, got ''")
    return Path(word)


@dataclass(frozen=True, kw_only=True)
class Predict(BadImages, Command):
    """Classify image files with a checkpoint. The result is printed, one line per image, or written to --out.

    Examples:
      hatnet-predict scan.png --checkpoint runs/digits --top-k 3
      hatnet-predict scans "more/**/*.jpg" --checkpoint runs/digits --out scans.csv
      find . -name "*.jpg" | hatnet-predict - --checkpoint runs/digits --out all.html
    """

    images: Annotated[
        Positional[tuple[Path, ...]],
        several(option(Path, "IMAGE", _image)),
        arg(
            help="Image files, patterns such as 'scans/**/*.png', or folders, which are searched recursively; - reads "
            "names from standard input.",
            help_behavior_hint="(required)",
        ),
    ]

    checkpoint: Checkpoint

    variant: Variant = None

    top_k: Annotated[int, whole(1), arg(metavar="K")] = 1
    """Classes to show of each image, with their probabilities."""

    device: Device = "auto"

    batch: Batch = 32

    size: Annotated[
        int | None, whole(MIN_SIZE, MAX_SIZE, "PIXELS"), arg(help_behavior_hint="(default: as trained)")
    ] = None
    """Side of the square input in pixels, 32 to 2048."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "fp32"
    """Precision to compute in; auto: bf16 where the device has it."""

    format: Format = "table"

    out: Annotated[Path | None, file_ending(".csv", ".jsonl", ".html"), arg(help_behavior_hint="")] = None
    """Write the results to this .csv or .jsonl file as they come, or as pictures to an .html page."""

    def run(self) -> int:
        """Classify."""
        if self.out is not None:
            writable_file(self.out)
            if self.format != "table":
                raise UsageError(f"--format has no effect with --out, got {self.format}")
        from hatnet_train.classifier import load_classifier
        from hatnet_train.predict import find_images, predictions
        from hatnet_train.prediction_files import write_predictions

        classifier = load_classifier(self.checkpoint, self.variant)
        if self.size is not None:
            classifier = dataclasses.replace(classifier, image_size=self.size)
        found, skipped = find_images([path for path in self.images if path != STDIN], self.skip)
        if str(skipped):
            logger.info("%s", skipped)
        piped = STDIN in self.images
        rows = predictions(
            classifier,
            _with_stdin(found) if piped else found,
            self.top_k,
            self.device,
            self.skip,
            batch_size=self.batch,
            precision=self.precision,
        )
        if self.out is None:
            count = self._print(rows)
        else:
            count = write_predictions(self.out, rows)
            if count:
                say(f"{self.out}: {count} images")
        if not count and not self.problems:
            raise ValueError("standard input must name images, one per line, got none")
        return self.finish(count + len(self.problems))

    def _print(self, results: Iterator[dict[str, Any]]) -> int:
        rows = []
        try:
            for row in results:
                rows.append(row)
                if self.format == "table":
                    ranked = zip(row["classes"], row["probabilities"], strict=True)
                    say(f"{row['image']}  " + "  ".join(f"{name} {100 * p:.1f} %" for name, p in ranked))
        finally:
            if rows and self.format == "json":  # of the images so far, whatever stopped the rest
                say(json.dumps(rows, indent=2))
        return len(rows)


def _with_stdin(found: list[Path]) -> Iterator[Path]:
    yield from found
    yield from (Path(name) for line in sys.stdin if (name := line.rstrip("\r\n")))
