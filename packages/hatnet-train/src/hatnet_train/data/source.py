"""Interface of a set of labelled images, :class:`Source`, and the two sets that need no files."""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hatnet_train.data.images import to_tensor

HELD_OUT = 360
"""Digits that are kept for evaluation."""

SYNTHETIC_TRAINING, SYNTHETIC_HELD_OUT, SYNTHETIC_CLASSES = 1_281_167, 50_000, 1000
"""Sizes of the synthetic data: ImageNet's."""


class Source(Protocol):
    """Labelled images that can be read in any order."""

    classes: tuple[str, ...]
    """Names of the classes; labels are places in it."""

    labels: np.ndarray
    """[N] int64."""

    def __len__(self) -> int:
        """Return the number of images."""

    def image(self, i: int) -> Tensor:
        """Image ``i`` decoded, [3, H, W] uint8; raises ValueError with its name if it cannot be read."""

    def name(self, i: int) -> str:
        """Name the origin of image ``i`` in messages."""

    def digest(self) -> str:
        """Return a hash of the content: equal on two machines if they see the same images with the same labels."""


class Digits:
    """The 1,797 hand-written digits that ship with scikit-learn, 8×8 grey scans, 360 of them held out.

    The split is fixed and stratified by class.

    Args:
        train: the 1,437 training images, or the 360 held out.

    Attributes:
        scans: [N, 8, 8] uint8.

    Raises:
        ImportError: if scikit-learn is not installed.
    """

    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, *, train: bool) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("the digits recipe needs scikit-learn: pip install 'hatnet-train[digits]'") from error
        digits = load_digits()
        pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
        everything = np.arange(len(pixels))
        split = train_test_split(everything, test_size=HELD_OUT, stratify=digits.target, random_state=0)
        self._chosen = split[0] if train else split[1]
        self.scans = pixels[self._chosen]
        self.labels = digits.target[self._chosen].astype(np.int64)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def image(self, i: int) -> Tensor:
        """Scan ``i``, [3, 8, 8] uint8."""
        return to_tensor(Image.fromarray(self.scans[i]))

    def name(self, i: int) -> str:
        """Return the number of scan ``i`` in scikit-learn's data."""
        return f"digit {self._chosen[i]}"

    def digest(self) -> str:
        """Hash of scans and labels."""
        return hashlib.sha256(self.scans.tobytes() + self.labels.tobytes()).hexdigest()


class Synthetic:
    """As many images as ImageNet, drawn when asked for: noise in blocks, the labels in turn. For benchmarks.

    Args:
        train: 1,281,167 training images, or 50,000 held out.
        size: height and width of the images in pixels.
    """

    def __init__(self, *, train: bool, size: int) -> None:
        self.classes = tuple(f"class-{i:04d}" for i in range(SYNTHETIC_CLASSES))
        self.labels = np.arange(SYNTHETIC_TRAINING if train else SYNTHETIC_HELD_OUT) % SYNTHETIC_CLASSES
        self.size = size
        self._blocks = np.random.default_rng(int(train)).integers(0, 256, (64, 3, 8, 8), dtype=np.uint8)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def image(self, i: int) -> Tensor:
        """Image ``i``, [3, size, size] uint8: one of 64 patterns of 8×8 blocks."""
        block = -(-self.size // 8)
        blocks = torch.from_numpy(self._blocks[i % len(self._blocks)])
        return blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, : self.size, : self.size].contiguous()

    def name(self, i: int) -> str:
        """Return the number of image ``i``."""
        return f"synthetic image {i}"

    def digest(self) -> str:
        """Hash of the patterns and the number of images."""
        return hashlib.sha256(self._blocks.tobytes() + len(self).to_bytes(8, "little")).hexdigest()
