"""Compare one record of a dataset with its files: image, label image and masks.

Of an image the header is read. A label image is read in full, because its values are the classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hatnet_dense.errors import cut, said

ORIENTATION = 0x0112
"""EXIF tag of the orientation of a picture; values 5 to 8 swap height and width."""

LABELS = 256
"""Number of values of a label image."""


def problem_of(record: Mapping[str, Any]) -> str | None:
    """Describe the first problem of a record, None if there is none.

    Args:
        record: with the keys ``img_path``, ``seg_map_path``, ``height``, ``width`` and ``instances`` of MMEngine.
    """
    path = record.get("img_path")
    if path is None or "://" in str(path):
        return None
    try:
        size = _size(path)
        labels = record.get("seg_map_path")
        if labels is not None and _size(labels) != size:
            return f"{labels}: size must be that of its image {path}, {_shape(size)}, got {_shape(_size(labels))}"
    except FileNotFoundError as error:
        return missing(error)
    except Image.DecompressionBombError:  # too large for Pillow, but maybe not for the loader of the library
        return None
    except Exception as error:  # Pillow raises anything on a broken file
        return unreadable(path, error)
    stated = (record.get("width"), record.get("height"))
    if None not in stated and stated != size:
        return f"{path}: size must be that of its annotation, {_shape(stated)}, got {_shape(size)}"
    for instance in record.get("instances", []):
        if isinstance(instance.get("mask"), Mapping) and (problem := _mask_problem(instance["mask"], size)):
            return f"{path}: {problem}"
    return None


def count_labels(
    record: Mapping[str, Any], loader: Any, classes: int, ignore_index: int
) -> tuple[str | None, Counter[int]]:
    """Count the pixels of each class in the label image of a record.

    Args:
        record: with ``seg_map_path``.
        loader: ``LoadAnnotations`` of the training pipeline, which may map values.
        classes: number of classes of the dataset.
        ignore_index: value of pixels without a class.

    Returns:
        The problem of the label image, None if there is none, and the counts.
    """
    path = record["seg_map_path"]
    if "://" in str(path):
        return None, Counter()
    try:
        with Image.open(path) as image:
            bands, mode = image.getbands(), image.mode
            highest: Any = image.getextrema()[1] if mode.startswith(("I", "F")) else 0
        if len(bands) > 1:
            return f"{path}: a label image must have one channel, whose values are classes, got {mode}", Counter()
        if highest >= LABELS:
            return f"{path}: values of a label image must be from 0 to {LABELS - 1}, got {highest}", Counter()
        values = np.bincount(loader(record)["gt_seg_map"].ravel(), minlength=LABELS)
    except Exception as error:  # the loaders raise anything on a broken file
        return unreadable(path, error), Counter()
    counts = Counter({i: int(n) for i, n in enumerate(values) if n})
    unknown = [i for i in counts if i >= classes and i != ignore_index]
    return (unknown_class(path, unknown[0], classes, ignore_index), Counter()) if unknown else (None, counts)


def unknown_class(path: Any, value: int, classes: int, ignore_index: int | None) -> str:
    """Describe a value of a label image that is not a class."""
    return (
        f"{path}: classes must be from 0 to {classes - 1}, or {ignore_index} for none, got {value} "
        "(after reduce_zero_label, if set)"
    )


def missing(error: FileNotFoundError) -> str:
    """Describe a file that does not exist."""
    return f"{error.filename}: the file is missing" if error.filename else str(error)


def unreadable(path: Any, error: Exception) -> str:
    """Describe a file that exists and cannot be read."""
    return f"{path}: cannot be read ({cut(said(error))})"


def _mask_problem(mask: Mapping[str, Any], size: tuple[int, int]) -> str | None:
    """Describe the problem of a mask of run lengths in an image of (width, height)."""
    given = tuple(mask.get("size") or ())[::-1]
    if given != size:
        return f"size of a mask must be {_shape(size)}, got {_shape(given)}"
    counts = mask.get("counts")
    lengths = _run_lengths(counts.encode() if isinstance(counts, str) else counts) if counts else []
    if not all(isinstance(n, int) and n >= 0 for n in lengths) or sum(lengths) != size[0] * size[1]:
        return f"run lengths of a mask must cover {_shape(size)}, got {str(counts)[:40]!r}"
    return None


def _run_lengths(counts: Any) -> list[Any]:
    """Decode COCO's compressed run lengths.

    ``pycocotools.mask.decode`` does not help here: it fills the rest of a short mask with whatever was in memory, and
    crashes the process on some damaged strings (both seen in 2.0.11).
    """
    if not isinstance(counts, bytes):
        return counts if isinstance(counts, list) else []
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        # from 48 on: five bits of the number, lowest first; bit 5 if more follow; bit 4 of the last is the sign
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        # from the fourth number on, differences to the last but one
        lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
        value = shift = 0
    return lengths


def _size(path: str | Path) -> tuple[int, int]:
    """Read width and height of a picture from its header, turned as EXIF says."""
    with Image.open(path) as image:
        width, height = image.size
        # Pillow decodes all of a PNG to find its EXIF data
        turned = image.format != "PNG" and image.getexif().get(ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def _shape(size: tuple[Any, ...]) -> str:
    return "×".join(map(str, size)) or "none"
