"""Checks of what the methods of a model are called with; ``config.py`` checks what a model is built with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from hatnet_core.config import as_index, positive_int
from hatnet_core.variants import MIN_SIZE


def check_images(x: Tensor, in_chans: int) -> Tensor:
    """Return ``x``; raise ValueError unless it is a floating batch of images with ``in_chans`` channels."""
    if not isinstance(x, Tensor):
        raise ValueError(f"input must be a tensor, got {type(x).__name__}")
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"input must be B×{in_chans}×H×W, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"input must be floating and normalised, got {x.dtype}")
    if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
        raise ValueError(f"input height and width must be at least {MIN_SIZE} pixels, got {x.shape[2]}×{x.shape[3]}")
    return x


def stage_indices(indices: int | Sequence[int] | None, count: int = 4) -> list[int]:
    """Return stages in order, by timm's rule: a number n means the last n, None all; negative ones count from the end.

    Raises:
        ValueError: if a stage is not one of ``count``.
    """
    try:
        if indices is None:
            wanted = set(range(count))
        elif isinstance(indices, Iterable):
            wanted = {range(count)[as_index(i)] for i in indices}
        else:
            wanted = set(range(count)[-positive_int("indices", indices) :]) if as_index(indices) <= count else set()
    except (TypeError, ValueError, IndexError):
        wanted = set()
    if not wanted:
        raise ValueError(
            f"indices must name stages out of 0 to {count - 1} (or -{count} to -1 from the end), "
            f"or be a number of last stages, got {indices!r}"
        )
    return sorted(wanted)
