"""Images in, tensors out: preprocessing, the digits data set, and its batches.

The augmentation of an image depends on the seed, the epoch and the image alone, as its place in the order does
(``sampler.py``), so that any number of processes sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hatnet_train.sampler import GlobalOrder, evaluation_share

MEAN = 0.5
STD = 0.5
"""Pixel values in [0, 1] are normalised to (value - MEAN) / STD, in [-1, 1]."""

HELD_OUT = 360


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file as RGB.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not an image that Pillow can decode.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}: expected an existing file")
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow would clip the 16 bits instead of scaling them
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from error


def preprocess(image: Image.Image, size: int, mean: float = MEAN, std: float = STD) -> Tensor:
    """Resize the short side to ``size`` pixels (bilinear), crop the centre square and normalise.

    Returns:
        [3, size, size], float32: (value - mean) / std of values in [0, 1].
    """
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).contiguous()


class Digits:
    """The 1,797 hand-written digits that ship with scikit-learn, 8×8 grey scans, 360 of them held out.

    The split is fixed and stratified by class. ``data[i]`` is the preprocessed image i, [3, size, size].

    Args:
        train: the 1,437 training images, or the 360 held out.
        size: side in pixels that :func:`preprocess` resizes to.

    Attributes:
        scans: the original scans, grey images of 8×8 pixels, for looking at.
        labels: [N] int64, 0-9.

    Raises:
        ImportError: if scikit-learn is not installed.
    """

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, *, train: bool, size: int) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("the digits recipe needs scikit-learn: pip install 'hatnet-train[digits]'") from error
        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
        everything = np.arange(len(pixels))
        split = train_test_split(everything, test_size=HELD_OUT, stratify=digits.target, random_state=0)
        chosen = split[0] if train else split[1]
        self.scans = [Image.fromarray(pixels[i]) for i in chosen]
        self.size = size
        self.labels = torch.from_numpy(digits.target[chosen]).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Tensor:
        return preprocess(self.scans[i], self.size)


def shift(image: Tensor, rows: int, columns: int) -> Tensor:
    """Move an image [C, H, W] down by ``rows`` and right by ``columns`` pixels; black (-1) fills the border."""
    height, width = image.shape[-2:]
    moved = torch.full_like(image, (0 - MEAN) / STD)
    target = moved[:, max(rows, 0) : height + min(rows, 0), max(columns, 0) : width + min(columns, 0)]
    target.copy_(image[:, max(-rows, 0) : height - max(rows, 0), max(-columns, 0) : width - max(columns, 0)])
    return moved


def train_batches(
    data: Digits, order: GlobalOrder, *, epoch: int, max_shift: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each global batch of an epoch.

    Args:
        data: the training images.
        order: the order in which the run sees them; its seed is that of the augmentation, too.
        epoch: counted from 0.
        max_shift: largest random shift in pixels.
        rank: this process.
        world_size: number of processes.

    Yields:
        Images [batch_size / world_size, 3, H, W] and labels [batch_size / world_size].
    """
    for indices in order.shares(epoch, rank=rank, world_size=world_size):
        yield (
            torch.stack([_augment(data[i], max_shift, [order.seed, epoch, int(i)]) for i in indices]),
            data.labels[torch.from_numpy(indices)],
        )


def evaluation_batches(
    data: Digits, *, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's held-out images in batches; over all ranks every image comes exactly once.

    Yields:
        Images [at most batch_size, 3, H, W] and labels.
    """
    own = torch.from_numpy(evaluation_share(len(data), rank=rank, world_size=world_size))
    for indices in torch.split(own, batch_size):
        yield torch.stack([data[int(i)] for i in indices]), data.labels[indices]


def _augment(image: Tensor, max_shift: int, seed: list[int]) -> Tensor:
    rows, columns = np.random.default_rng(seed).integers(-max_shift, max_shift, size=2, endpoint=True)
    return shift(image, int(rows), int(columns))
