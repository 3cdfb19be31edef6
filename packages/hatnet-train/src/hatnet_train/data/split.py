"""Held-out images of data that has no folder for them: a share of every class, chosen by the seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HELD_OUT_FOLDERS = ("val", "validation", "test")
"""Folders, or values in a CSV file, of held-out images; the first of them is taken."""

MIN_IMAGES = 4
"""Images per class, on average, from which a share is held out: fewer measure nothing."""


@dataclass(frozen=True)
class Split:
    """Origin of labels and of held-out images, where the layout of the data does not decide."""

    labels: str = ""
    """CSV file with labels; by default folders are classes."""

    held_out: float = 0.0
    """Share of the images to hold out of data without held-out ones; 0 for an error there."""

    seed: int = 0


AS_THE_DATA_IS = Split()
"""Labels and held-out images as the layout of the data has them."""


def held_out_places(labels: np.ndarray, classes: int, split: Split, name: str) -> np.ndarray:
    """Choose the images to hold out; the same for the same labels and seed.

    Args:
        labels: [N] int64.
        classes: number of classes.
        split: share and seed.
        name: of the data, for the error.

    Returns:
        [N] bool. Every class of two images or more has one on either side.

    Raises:
        ValueError: if there are too few images.
    """
    if len(labels) < MIN_IMAGES * classes:
        raise ValueError(
            f"{name} must contain {MIN_IMAGES} images per class or more, to hold some of them out, got {len(labels)} "
            f"of {classes} classes; or put held-out images into val/"
        )
    order = np.random.default_rng(split.seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class, each in random order
    counts = np.bincount(labels, minlength=classes)
    place_in_class = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    kept_out = np.minimum(np.maximum((split.held_out * counts).round(), 1), counts - 1)
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[order] = place_in_class < np.repeat(kept_out, counts)
    return chosen
