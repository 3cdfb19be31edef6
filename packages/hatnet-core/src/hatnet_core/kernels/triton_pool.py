"""Average pooling of channels_last maps in Triton, with its gradient (Eq. 10).

PyTorch's kernels for this layout read and write far more than the map, most of all in the backward pass, which took
4 % of a training step.

Imported only where Triton is installed.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hatnet_core.kernels.operator import ceil_div, on_device, power_of_two, register, to_tokens

SIZES = ("height", "width", "size")
"""Arguments that change with the model and the image; one compiled kernel serves all of them."""


def average_pool(x: Tensor, size: int) -> Tensor:
    """Average pooling with kernel and stride ``size``; pools at the border average the positions that exist.

    Args:
        x: [B, C, H, W] of a floating dtype; read in channels_last, of which another layout is a copy.
        size: G2.

    Returns:
        [B, C, ⌈H/G2⌉, ⌈W/G2⌉] in channels_last, the dtype of ``x``; sums are in float32.
    """
    return _operator(x, size)


def _forward(x: Tensor, size: int) -> Tensor:
    out = _empty(x, size)
    batch, channels, rows, columns = out.shape
    with on_device(x):
        _pool[(batch * rows * columns,)](to_tokens(x), out, *x.shape[2:], channels, size, **_blocks(channels))
    return out


def _backward(gradient: Tensor, shape: list[int], size: int) -> Tensor:
    """Gradient of the map of ``shape`` [B, C, H, W], given the ``gradient`` of the result."""
    batch, channels, height, width = shape
    out = gradient.new_empty(batch, height, width, channels)
    programs = batch * ceil_div(height, size) * ceil_div(width, size)
    with on_device(gradient):
        _spread[(programs,)](to_tokens(gradient), out, height, width, channels, size, **_blocks(channels))
    return out.permute(0, 3, 1, 2)


def _empty(x: Tensor, size: int) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty(batch, -(-height // size), -(-width // size), channels).permute(0, 3, 1, 2)


def _blocks(channels: int) -> dict[str, int]:
    block_c = power_of_two(channels)
    return {"block_n": max(1, 512 // block_c), "block_c": block_c, "num_warps": 1}


@triton.jit(do_not_specialize=SIZES)
def _pool(
    x: tl.tensor,
    out: tl.tensor,
    height: int,
    width: int,
    channels: int,
    size: int,
    block_n: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Average one pool."""
    channel = tl.arange(0, block_c)
    total = tl.zeros([block_n, block_c], tl.float32)
    for first in range(0, size * size, block_n):
        token, exists = _pool_tokens(first, height, width, size, block_n)
        at = token[:, None] * channels + channel[None, :]
        total += tl.load(x + at, mask=exists[:, None] & (channel < channels)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / _count(height, width, size)
    at = tl.program_id(0).to(tl.int64) * channels + channel
    tl.store(out + at, mean.to(out.dtype.element_ty), mask=channel < channels)


@triton.jit(do_not_specialize=SIZES)
def _spread(
    gradient: tl.tensor,
    x_gradient: tl.tensor,
    height: int,
    width: int,
    channels: int,
    size: int,
    block_n: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Compute the gradient of one pool, an equal share for each of its positions."""
    channel = tl.arange(0, block_c)
    pooled = tl.program_id(0).to(tl.int64) * channels + channel
    share = tl.load(gradient + pooled, mask=channel < channels, other=0.0).to(tl.float32)
    share /= _count(height, width, size)
    share = tl.broadcast_to(share.to(x_gradient.dtype.element_ty)[None, :], [block_n, block_c])
    for first in range(0, size * size, block_n):
        token, exists = _pool_tokens(first, height, width, size, block_n)
        at = token[:, None] * channels + channel[None, :]
        tl.store(x_gradient + at, share, mask=exists[:, None] & (channel < channels)[None, :])


@triton.jit
def _pool_tokens(first: int, height: int, width: int, size: int, block_n: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Numbers of the tokens [block_n] of this program's pool, from its position ``first``, and which of them exist."""
    columns, rows = tl.cdiv(width, size), tl.cdiv(height, size)
    pool = tl.program_id(0)
    place = first + tl.arange(0, block_n)
    y = pool // columns % rows * size + place // size
    x = pool % columns * size + place % size
    image = (pool // (columns * rows)).to(tl.int64)
    return (image * height + y) * width + x, (place < size * size) & (y < height) & (x < width)


@triton.jit
def _count(height: int, width: int, size: int) -> tl.tensor:
    """Positions of this program's pool that exist."""
    columns, rows = tl.cdiv(width, size), tl.cdiv(height, size)
    top = tl.program_id(0) // columns % rows * size
    left = tl.program_id(0) % columns * size
    return (tl.minimum(size, height - top) * tl.minimum(size, width - left)).to(tl.float32)


def _fake(x: Tensor, size: int) -> Tensor:
    return _empty(x, size)


def _fake_backward(gradient: Tensor, shape: list[int], size: int) -> Tensor:
    batch, channels, height, width = shape
    return gradient.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape, ctx.size = list(inputs[0].shape), inputs[1]


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return backward(gradient, ctx.shape, ctx.size), None


_operator = register("average_pool", _forward, _backward, _fake, _fake_backward, _keep, _gradients)
