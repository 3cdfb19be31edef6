"""Find and decode image files, in the same way for training, prediction, dense tasks and analysis.

Needs Pillow, which hatnet-core does not install. Nothing else in hatnet-core imports this module; packages that read
images require Pillow themselves.
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
    """Return whether a path is an image file by its name: a known suffix in any case, and no hidden part.

    Args:
        path: relative to the searched folder, so that only names below it count. A part that starts with a dot is
            hidden, such as ``.ipynb_checkpoints`` or ``._cat.jpg``.
    """
    path = PurePath(path)
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as a viewer shows it: rotated by its EXIF orientation, transparency on white.

    16 bits per channel are scaled to 8 and rounded. An unreadable EXIF is ignored.

    Args:
        image: an image of any of Pillow's modes, loaded or only opened.

    Returns:
        The image in mode RGB, 8 bits per channel. A rotation by 90° swaps height and width.

    Raises:
        ValueError: if the image has 32 bits per channel, whose range is unknown, or a mode that Pillow does not
            convert to RGB.
        OSError: if the file of an image that was only opened is damaged.
    """
    image.load()  # raise for damaged pixels here, not under the suppress for a damaged EXIF
    with contextlib.suppress(SyntaxError, ValueError, OSError):
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or (image.mode == "I" and not _in_16_bits(image)):
        raise ValueError("image must have 8 or 16 bits per channel, got 32")
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255
        return image.convert("I").point(lambda value: value / 257 + 0.5).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _in_16_bits(image: Image.Image) -> bool:
    lowest, highest = cast("tuple[float, float]", image.getextrema())  # has one channel
    return lowest >= 0 and highest < 2**16
