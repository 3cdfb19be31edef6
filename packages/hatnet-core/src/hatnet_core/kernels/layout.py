"""Memory layout, device and block sizes of the Triton kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H, W, C], contiguous; a view if ``x`` is in channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of ``x`` the current one, which Triton launches on."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def ceil_div(a: int, b: int) -> int:
    """⌈a/b⌉; ``triton.cdiv`` costs a microsecond per call."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()
