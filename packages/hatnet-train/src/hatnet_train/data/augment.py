"""Transforms of an image in a worker: random crop, flip, RandAugment and erasing, or the centre crop of evaluation.

The policies are timm's, as in DeiT. All of them draw from the global generators of Python, NumPy and torch, which
:func:`seed_generators` sets for one image, so that an image is augmented alike in whichever process.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandomCrop
from torchvision.transforms.v2 import functional as F

from hatnet_train.config import TrainConfig
from hatnet_train.data.images import to_pillow, to_tensor
from hatnet_train.fields import FieldError

MEAN, STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
"""Of the normalisation, for values in [0, 1]; timm's for ImageNet, used for all data."""

ASPECT_RATIOS = (3 / 4, 4 / 3)
"""Width to height of random crops, as in DeiT."""


@contextmanager
def own_generators() -> Iterator[None]:
    """Leave the generators of Python, NumPy and torch (on the CPU) as they were, whatever is done in between."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_generators(*key: int) -> None:
    """Seed the generators of Python, NumPy and torch (on the CPU) with ``key``."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))


class TrainTransform:
    """Augment one image: what :func:`seed_generators` was called with before decides how.

    Args:
        config: the run; its fields say what is on.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.size = config.images.image_size
        self.scale = (config.augmentation.min_scale, 1.0)
        self.hflip = config.augmentation.hflip
        self.shift = (
            RandomCrop(self.size, padding=config.augmentation.max_shift) if config.augmentation.max_shift else None
        )
        self.rand_augment = (
            _rand_augment(config.augmentation.rand_augment) if config.augmentation.rand_augment else None
        )
        self.random_erasing = config.augmentation.random_erasing
        self._erase = RandomErasing(probability=1.0, mode="pixel", device="cpu")

    def __call__(self, image: Tensor) -> Tensor:
        """From an image [3, H, W] uint8 of any size to [3, size, size] uint8."""
        image = self._crop(image)
        if torch.rand(()) < self.hflip:
            image = image.flip(-1)
        if self.rand_augment is not None:
            image = to_tensor(self.rand_augment(to_pillow(image)))
        if torch.rand(()) < self.random_erasing:
            image = self._erased(image)
        return image

    def _crop(self, image: Tensor) -> Tensor:
        if self.scale[0] == 1:
            image = centre_crop(image, self.size, crop_fraction=1.0)
            return image if self.shift is None else self.shift(image)
        # timm's choice of the crop; torchvision resizes bytes several times as fast as Pillow, to within two levels
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self.scale, ASPECT_RATIOS)
        crop = image[:, top : top + height, left : left + width]
        return F.resize(crop, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True)

    def _erased(self, image: Tensor) -> Tensor:
        """With one rectangle of noise that is normal in the normalised image, clipped to what bytes can hold."""
        mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
        erased = self._erase((image / 255 - mean) / std)
        return ((erased * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def centre_crop(image: Tensor, size: int, crop_fraction: float) -> Tensor:
    """Resize an image so that its centre square of ``size`` pixels is ``crop_fraction`` of the short side, and crop.

    Args:
        image: [3, H, W], uint8.
        size: side of the crop in pixels.
        crop_fraction: in (0, 1]; 0.875 is 224 of 256.

    Returns:
        [3, size, size], uint8.
    """
    height, width = image.shape[-2:]
    scale = round(size / crop_fraction) / min(height, width)
    resized = [max(size, round(side * scale)) for side in (height, width)]
    if resized != [height, width]:
        image = F.resize(image, resized, InterpolationMode.BICUBIC, antialias=True)
    top, left = (resized[0] - size) // 2, (resized[1] - size) // 2
    return image[:, top : top + size, left : left + size].contiguous()


def normalise(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Bytes [..., 3, H, W] as float32, (value - mean) / std of values in [0, 1], on their device."""
    centre = torch.tensor(mean, device=images.device)[:, None, None]
    scale = torch.tensor(std, device=images.device)[:, None, None]
    return (images.float() / 255 - centre) / scale


def _rand_augment(policy: str) -> RandAugment:
    """RandAugment as timm's ``create_transform`` builds it; raises ValueError if the policy is not one."""
    fill = tuple(round(255 * value) for value in MEAN)
    try:
        return rand_augment_transform(policy, {"img_mean": fill, "interpolation": Image.Resampling.BICUBIC})
    except (AssertionError, KeyError, ValueError) as error:
        problem = f"must be a policy of timm such as rand-m9-mstd0.5, got {policy!r}"
        raise FieldError("rand_augment", problem) from error
