"""Mixup and CutMix on the device, pair by pair.

timm's Mixup draws one share and box for the whole batch of a GPU, so that what an image is mixed with depends on the
number of processes. Here neighbours in the global order are a pair and have their own share and box, as in timm's mode
"pair"; a pair is never split between processes, and the draws are timm's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import cutmix_bbox_and_lam
from torch import Tensor

SWITCH_PROBABILITY = 0.5
"""Probability of CutMix where both are on (DeiT)."""


def draw_mixing(size: int, mixup: float, cutmix: float) -> tuple[float, float, float, float, float]:
    """Draw how one pair is mixed, from NumPy's global generator, in the order in which timm draws.

    Args:
        size: side of the images in pixels.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none.

    Returns:
        The share of the image itself in image and label, and the CutMix box filled from the partner image (top,
        bottom, left, right; all 0 for mixup).
    """
    np.random.rand()  # timm asks here whether to mix at all; as in DeiT, always
    use_cutmix = np.random.rand() < SWITCH_PROBABILITY if mixup and cutmix else cutmix > 0
    alpha = cutmix if use_cutmix else mixup
    share = float(np.random.beta(alpha, alpha))
    if not use_cutmix or share == 1:
        return share, 0, 0, 0, 0
    box, share = cutmix_bbox_and_lam((size, size), share)
    top, bottom, left, right = (float(side) for side in box)
    return float(share), top, bottom, left, right


def mix(images: Tensor, mixing: Tensor) -> Tensor:
    """Mix every image with its neighbour.

    Args:
        images: [B, 3, H, W], float, B even.
        mixing: [B / 2, 5], a row of :func:`draw_mixing` a pair.

    Returns:
        [B, 3, H, W]: share · image + (1 - share) · neighbour, or the image with the neighbour's pixels in the box.
    """
    share, top, bottom, left, right = mixing.repeat_interleave(2, 0)[:, :, None, None, None].unbind(1)
    rows = torch.arange(images.shape[-2], device=images.device)[:, None]
    columns = torch.arange(images.shape[-1], device=images.device)
    outside = (rows < top) | (rows >= bottom) | (columns < left) | (columns >= right)
    own = torch.where(bottom > 0, outside, share).to(images.dtype)
    return images * own + _neighbours(images) * (1 - own)


def mix_labels(labels: Tensor, mixing: Tensor, classes: int, smoothing: float) -> Tensor:
    """Targets of mixed images.

    Args:
        labels: [B], int64, B even.
        mixing: [B / 2, 5], as for :func:`mix`.
        classes: number of classes K.
        smoothing: label smoothing.

    Returns:
        [B, K], float32: the smoothed labels of image and neighbour by their shares.
    """
    share = mixing[:, :1].repeat_interleave(2, 0)
    targets = F.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes
    return share * targets + (1 - share) * _neighbours(targets)


def _neighbours(batch: Tensor) -> Tensor:
    """Every pair the other way round."""
    return batch.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
