"""Measure exported files side by side on the images of a folder: accuracy, size, speed, difference from the model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hatnet_core.export.formats import Runner
from hatnet_core.preprocessing import Preprocessing

SPLITS = ("val", "validation", "test")
"""Names of the folder with held-out images; the first that exists counts."""

BATCH = 32
"""Images that a file computes at a time, unless it takes one."""


@dataclass(frozen=True)
class Labelled:
    """Images of a folder with one folder per class."""

    files: tuple[Path, ...]

    labels: Tensor
    """[N], the class of each image, as its index in the model's classes."""

    def batches(self, preprocessing: Preprocessing, size: int) -> Iterator[Tensor]:
        """Read the images → inputs [size, 3, image_size, image_size], the last of fewer.

        Raises:
            ValueError: naming the file that cannot be read.
        """
        for start in range(0, len(self.files), size):
            yield torch.stack([preprocessing.open(file) for file in self.files[start : start + size]])


def held_out(folder: Path, classes: Sequence[str]) -> Labelled:
    """Find the held-out images in ``folder/val/CLASS``.

    Args:
        folder: the folder with ``val``, ``validation`` or ``test``.
        classes: names of the model's classes; each has a folder, in any of which there are images.

    Raises:
        ValueError: if a folder is missing, is not a class, or contains no image.
    """
    split = next((folder / name for name in SPLITS if (folder / name).is_dir()), None)
    if split is None:
        raise ValueError(f"{folder} must be a folder with {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    return _labelled(split, classes)


def calibration(folder: Path, classes: Sequence[str], count: int) -> Labelled:
    """Choose ``count`` images, evenly spread over the classes, from ``folder/train``, else from the held-out ones."""
    found = _labelled(folder / "train", classes) if (folder / "train").is_dir() else held_out(folder, classes)
    step = max(1.0, len(found.files) / count)
    chosen = [int(i * step) for i in range(min(count, len(found.files)))]
    return Labelled(tuple(found.files[i] for i in chosen), found.labels[chosen])


def _labelled(split: Path, classes: Sequence[str]) -> Labelled:
    from hatnet_core.images import is_image_file

    present = {path.name for path in split.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if unknown := sorted(present - set(classes)):
        raise ValueError(f"{split} must contain folders of the model's classes only, got {unknown[0]!r}")
    files, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(p for p in (split / name).rglob("*") if is_image_file(p.relative_to(split)))
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"{split} must contain images in folders of {list(classes[:3])!r}, got none")
    return Labelled(tuple(files), torch.tensor(labels))


def logits_of(run: Runner, batches: Iterable[Tensor]) -> tuple[Tensor, float]:
    """Run all images, the first batch twice to warm up → logits [N, num_classes], images per second of the runs."""
    found: list[Tensor] = []
    seconds = 0.0
    with torch.inference_mode():
        for batch in batches:
            if not found:
                run(batch)
            start = time.perf_counter()
            found.append(run(batch))
            seconds += time.perf_counter() - start
    logits = torch.cat(found)
    return logits, len(logits) / seconds


def measure(run: Runner, batches: Iterable[Tensor], labels: Tensor, expected: Tensor) -> dict[str, Any]:
    """Measure one opened file.

    Args:
        run: the file.
        batches: the images.
        labels: [N].
        expected: logits [N, num_classes] of the model.

    Returns:
        ``images``, ``top1`` (percent), ``agreement`` (percent of images with the class of the model),
        ``images_per_second``, and ``largest_difference`` of the logits, relative to the largest logit.
    """
    logits, speed = logits_of(run, batches)
    return {
        "images": len(labels),
        "top1": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "agreement": 100 * (logits.argmax(1) == expected.argmax(1)).double().mean().item(),
        "images_per_second": speed,
        "largest_difference": ((logits - expected).abs().max() / expected.abs().max()).item(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the measurements, one format per line."""
    lines = [("format", "MB", "top-1 %", "as the model %", "images/s", "difference")]
    for row in rows:
        name = f"{row['format']} {row['precision']}"
        if "skipped" in row:
            lines.append((name, row["skipped"], "", "", "", ""))
            continue
        numbers = (f"{row['bytes'] / 1e6:.1f}", f"{row['top1']:.2f}", f"{row['agreement']:.2f}")
        lines.append((name, *numbers, f"{row['images_per_second']:.0f}", f"{row['largest_difference']:.1e}"))
    skipped = {i for i, row in enumerate(rows, 1) if "skipped" in row}
    widths = [max(len(line[i]) for n, line in enumerate(lines) if i == 0 or n not in skipped) for i in range(6)]
    shown = []
    for n, (name, *cells) in enumerate(lines):
        aligned = cells[:1] if n in skipped else [cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True)]
        shown.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(shown)
