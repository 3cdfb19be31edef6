"""Find and decode image files the same way in training, prediction, dense tasks and analysis.

Needs Pillow, which hatnet-core does not install: nothing else in it imports this module, the packages that read images
require Pillow themselves.
"""

from __future__ import annotations

import contextlib
from pathlib import PurePath
from typing import cast

from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes of image files, in lower case."""


def is_image_file(path: str | PurePath) -> bool:
    """Return whether every command takes a path for an image: a known suffix in any case, no hidden part.

    Args:
        path: relative to the folder that is searched, so that only names below it count as hidden. A part that
            starts with a dot is hidden, such as ``.ipynb_checkpoints`` or ``._cat.jpg``.
    """
    path = PurePath(path)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB as a viewer shows it: turned upright as its EXIF says, transparency on white.

    16 bits a channel are scaled to 8, rounded. An EXIF that cannot be read turns nothing.

    Args:
        image: of any of Pillow's modes, loaded or only opened.

    Returns:
        Of mode RGB, 8 bits a channel; height and width are swapped where EXIF turns by a quarter.

    Raises:
        ValueError: if the image holds numbers of 32 bits, whose range nothing tells, or is of a mode that Pillow does
            not convert to RGB.
        OSError: if a file that was only opened turns out to be damaged.
    """
    image.load()  # what is damaged in the pixels is not taken for a damaged EXIF
    with contextlib.suppress(SyntaxError, ValueError, OSError):
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or (image.mode == "I" and not _in_16_bits(image)):
        raise ValueError("it holds numbers of 32 bits; expected an image of 8 or 16 bits a channel")
    if image.mode.startswith("I"):  # Pillow alone would cut off what is above 255
        return image.convert("I").point(lambda value: value / 257 + 0.5).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _in_16_bits(image: Image.Image) -> bool:
    lowest, highest = cast("tuple[float, float]", image.getextrema())  # of its one channel
    return lowest >= 0 and highest < 2**16
