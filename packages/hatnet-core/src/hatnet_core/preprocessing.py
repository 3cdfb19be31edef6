"""Turn an image into the input of a classifier, and an output into class names, as a checkpoint records it.

Needs no more than torch, except :meth:`Preprocessing.open`, which reads files with Pillow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hatnet_core.checkpoint.reading import SIZE
from hatnet_core.config import HATNetConfig, positive_int
from hatnet_core.variants import MIN_SIZE

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Normalisation of the paper's models, of values in [0, 1]."""


@dataclass(frozen=True)
class Preprocessing:
    """Class names, and the steps from an image to the input of a model; a default is that of the paper's models.

    The short side is resized so that ``image_size`` is ``crop_fraction`` of it. The centre square is cropped, divided
    by 255 and normalised.

    Raises:
        ValueError: naming the field, if one is out of range.
    """

    classes: tuple[str, ...]
    """Names in the order of the outputs; numbers if the checkpoint has no names."""

    image_size: int = SIZE
    """Side of the input in pixels."""

    crop_fraction: float = 0.875
    """Share of the short side that the crop takes."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each channel, for values in [0, 1]."""

    std: tuple[float, ...] = IMAGENET_STD
    """Standard deviation of each channel."""

    interpolation: str = "bicubic"
    """Interpolation of the resizing, with antialiasing."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("classes", "mean", "std"):
            if not isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name} must be a list, got {getattr(self, name)!r}")
        if not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes must be names, got {self.classes!r}")
        positive_int("image_size", self.image_size, lowest=MIN_SIZE)
        _check_numbers("crop_fraction", [self.crop_fraction])
        if self.crop_fraction > 1:
            raise ValueError(f"crop_fraction must be at most 1, got {self.crop_fraction}")
        _check_numbers("mean", self.mean, low=-math.inf)
        _check_numbers("std", self.std)
        if len(self.mean) != len(self.std):
            raise ValueError(f"std must be {len(self.mean)} numbers, as many as mean, got {self.std!r}")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation must be 'bicubic' or 'bilinear', got {self.interpolation!r}")

    @classmethod
    def of(cls, metadata: Mapping[str, Any], config: HATNetConfig) -> Preprocessing:
        """Read the fields out of a checkpoint's metadata, for a model with the arguments ``config``.

        Args:
            metadata: from :func:`hatnet_core.read_metadata`; a field that is missing has its default.
            config: arguments of the model; one of other channels than three is not normalised by default.

        Raises:
            ValueError: if a field is out of range, or does not fit the model.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in metadata.items() if name in names
        }
        values.setdefault("classes", tuple(map(str, range(config.num_classes))))
        if config.in_chans != len(IMAGENET_MEAN):
            values = {"mean": (0.0,) * config.in_chans, "std": (1.0,) * config.in_chans} | values
        found = cls(**values)
        if len(found.classes) != config.num_classes:
            raise ValueError(f"classes must be {config.num_classes} names, one per output, got {len(found.classes)}")
        if len(found.mean) != config.in_chans:
            raise ValueError(f"mean must be {config.in_chans} numbers, one per input channel, got {found.mean!r}")
        return found

    @property
    def resize(self) -> int:
        """Length in pixels to which the short side is resized."""
        return round(self.image_size / self.crop_fraction)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and ``resize`` as values of JSON."""
        return {**dataclasses.asdict(self), "resize": self.resize}

    def __call__(self, image: Tensor) -> Tensor:
        """Image [C, H, W] uint8 → input [C, image_size, image_size] float32."""
        height, width = image.shape[-2:]
        size = self.image_size
        sides = [max(size, round(side * self.resize / min(height, width))) for side in (height, width)]
        if sides != [height, width]:
            image = F.interpolate(image[None], sides, mode=self.interpolation, antialias=True)[0]
        top, left = ((side - size) // 2 for side in sides)
        crop = image[:, top : top + size, left : left + size].float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (crop - mean) / std

    def open(self, path: str | Path) -> Tensor:
        """Read an image file as RGB → input [3, image_size, image_size] float32.

        Raises:
            ValueError: naming the file, if it is not a readable image.
        """
        from PIL import Image

        from hatnet_core.images import to_rgb

        try:
            with Image.open(path) as image:
                rgb = to_rgb(image)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path}: not a readable image: {error}") from None
        pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
        return self(pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1))


def _check_numbers(name: str, values: Sequence[Any], low: float = 0) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
            raise ValueError(f"{name} must be numbers above {low}, got {value!r}")
