"""The memory layout of the kernels: channels last, so that the values of a position lie together."""

from __future__ import annotations

from torch import Tensor


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H, W, C], contiguous; a view of what is channels_last already."""
    return x.permute(0, 2, 3, 1).contiguous()
