"""Encoded image files in, uint8 tensors out: pictures as :func:`hatnet_core.images.to_rgb` reads them, upright."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from hatnet_core.images import to_rgb
from hatnet_train.workers import OF_THE_MACHINE

_JPEG = b"\xff\xd8\xff"

_ORIENTED_BY_XMP = b"tiff:Orientation"
"""In a JPEG file whose XMP says how to turn it: Pillow obeys it where EXIF is silent, torchvision does not read it."""


def read_image(path: str | Path) -> Tensor:
    """Decode an image file as RGB, upright, with what is transparent on white.

    Returns:
        [3, H, W], uint8.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not an image that Pillow can decode.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}: expected an existing file")
    return decode(read_file(path), str(path))


def read_file(path: str | Path) -> bytes:
    """Read an image file.

    Raises:
        ValueError: naming the file, if it cannot be read.
        OSError: if file descriptors or memory ran out, which is not the file's fault.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: OSError) -> Exception:
    """Return the error to raise where a file cannot be read: ``error`` itself if it says nothing of the file."""
    return error if error.errno in OF_THE_MACHINE else ValueError(f"cannot read {path}: {error.strerror}")


def decode(encoded: bytes, name: str) -> Tensor:
    """Decode an image as :func:`hatnet_core.images.to_rgb` does.

    torchvision decodes JPEG, with Pillow's pixels and faster; Pillow all the rest.

    Args:
        encoded: the bytes of an image file in any format that Pillow reads.
        name: where they come from, for the error message.

    Returns:
        [3, H, W], uint8.

    Raises:
        ValueError: if the bytes are no image, one that is damaged, or of numbers without a known range.
    """
    if encoded.startswith(_JPEG) and _ORIENTED_BY_XMP not in encoded:
        try:
            data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
            return decode_jpeg(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            pass  # of a kind that torchvision does not read, or damaged: Pillow reads it or says why not
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return to_tensor(to_rgb(image))
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read {name} as an image: its {len(encoded)} bytes are of no known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {name} as an image: {error}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a Pillow image to an RGB tensor, [3, H, W], uint8."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_pillow(image: Tensor) -> Image.Image:
    """Convert an RGB tensor [3, H, W], uint8, to a Pillow image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
