"""Attention inside each G1×G1 grid in Triton (Eq. 6-8), straight from the map to the map.

Fused attention of PyTorch wants the positions of a grid side by side, so that each of queries, keys, values and result
is copied into that order or out of it, and its gradient as well; and a mask where grids hang over the edge. Here one
program per grid and head reads its rows of the map in channels_last where they lie and writes the result where it
belongs. Positions outside the map are neither read, nor attended to, nor written. The backward pass keeps only the
input and computes the attention weights again.

Imported only where Triton is installed.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hatnet_core.kernels.layout import to_tokens

LIMITS = {torch.float32: (64, 4096), torch.bfloat16: (256, 8192), torch.float16: (256, 8192)}
"""By dtype, the most positions of a grid and the most values of a head's keys in it, both rounded up to powers of two.

Keys and values of a whole grid are held at a time. Within these limits the compiled kernels need at most 72 KB of
shared memory; GPUs since Ampere grant 99 KB or more.
"""

PRECISION = tl.constexpr("tf32x3")
"""A product of float32 is taken as three of tensor cores, to nearly the accuracy of float32; says nothing to others.

Without tensor cores (``ieee``) the compiler needs minutes, and the kernel more registers than there are.
"""

SIZES = ("height", "width", "heads", "grid_h", "grid_w")
"""One compiled kernel serves all of these."""


def takes(qkv: Tensor, num_heads: int, grid_size: int) -> bool:
    """Whether :func:`grid_attention` computes these arguments rather than refuse them."""
    grid, head_dim = _shape(qkv, num_heads, grid_size)
    positions, values = LIMITS.get(qkv.dtype, (0, 0))
    block_n, block_d = _padded(grid[0] * grid[1]), _padded(head_dim)
    return block_n <= positions and block_n * block_d <= values


@torch.library.custom_op("hatnet::grid_attention", mutates_args=())
def grid_attention(qkv: Tensor, num_heads: int, grid_size: int) -> Tensor:
    """softmax(Q·Kᵀ/√head_dim)·V inside each G1×G1 grid, per head (Eq. 6-8).

    The last grids at the right and bottom are what is left of the map; where a side of the map is below G1, so is the
    grid's. Products are of the dtype of ``qkv``, their sums and the softmax of float32.

    Args:
        qkv: [B, 3C, H, W] of float32, bfloat16 or float16, channels laid out as (q | k | v) × heads × head_dim; read
            in channels_last, of which another layout is a copy.
        num_heads: number of heads; divides C.
        grid_size: G1, side of a grid in positions.

    Returns:
        [B, C, H, W] in channels_last, the dtype of ``qkv``.

    Raises:
        ValueError: if ``qkv`` is of another dtype, or its grids are beyond :data:`LIMITS`, as 16×16 positions of 64
            channels are.
    """
    sizes, blocks, programs = _work(qkv, num_heads, grid_size)
    batch, channels, height, width = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    with torch.cuda.device_of(qkv):
        _attend[(programs,)](to_tokens(qkv), out, *sizes, **blocks)
    return out.permute(0, 3, 1, 2)


@torch.library.custom_op("hatnet::grid_attention_backward", mutates_args=())
def _grid_attention_backward(gradient: Tensor, qkv: Tensor, num_heads: int, grid_size: int) -> Tensor:
    """Gradient of ``qkv``, given the ``gradient`` of the result."""
    sizes, blocks, programs = _work(qkv, num_heads, grid_size)
    tokens = to_tokens(qkv)
    qkv_gradient = torch.empty_like(tokens)
    with torch.cuda.device_of(qkv):
        _attend_backward[(programs,)](to_tokens(gradient), tokens, qkv_gradient, *sizes, **blocks)
    return qkv_gradient.permute(0, 3, 1, 2)


def _shape(qkv: Tensor, num_heads: int, grid_size: int) -> tuple[tuple[int, int], int]:
    """Sides of a grid in positions, and channels of a head."""
    _, channels, height, width = qkv.shape
    return (min(grid_size, height), min(grid_size, width)), channels // (3 * num_heads)


def _padded(size: int) -> int:
    """The power of two at or above ``size``, and 16 at least: what matrix products are made of."""
    return max(16, triton.next_power_of_2(size))


def _work(qkv: Tensor, num_heads: int, grid_size: int) -> tuple[tuple[int, ...], dict[str, int], int]:
    """The sizes that kernels take, their blocks, and the number of programs: one for each grid and head."""
    batch, _, height, width = qkv.shape
    (grid_h, grid_w), head_dim = _shape(qkv, num_heads, grid_size)
    if not takes(qkv, num_heads, grid_size):
        raise ValueError(
            "grid_attention in Triton takes grids of at most 256 positions and 8192 values of keys, in float32 64 and "
            f"4096, got {grid_h}×{grid_w} positions of {head_dim} channels in {qkv.dtype}"
        )
    block_n = _padded(grid_h * grid_w)
    blocks = {"head_dim": head_dim, "block_n": block_n, "block_m": block_n if block_n <= 64 else 32}
    blocks["block_d"] = _padded(head_dim)
    blocks["num_warps"] = 8 if block_n > 64 or qkv.dtype == torch.float32 else 4
    programs = batch * triton.cdiv(height, grid_h) * triton.cdiv(width, grid_w) * num_heads
    return (height, width, num_heads, grid_h, grid_w), blocks, programs


@triton.jit(do_not_specialize=SIZES)
def _attend(
    qkv: tl.tensor,
    out: tl.tensor,
    height: int,
    width: int,
    heads: int,
    grid_h: int,
    grid_w: int,
    head_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Attention of one head in one grid, ``block_m`` queries at a time."""
    dim = heads * head_dim
    head = tl.program_id(0) % heads * head_dim
    grid = tl.program_id(0) // heads
    key_token, key_exists = _grid(grid, 0, height, width, grid_h, grid_w, block_n)
    k = _load(qkv + dim + head, key_token, key_exists, 3 * dim, head_dim, block_d)
    v = _load(qkv + 2 * dim + head, key_token, key_exists, 3 * dim, head_dim, block_d)
    for first in tl.range(0, block_n, block_m, num_stages=1):
        token, exists = _grid(grid, first, height, width, grid_h, grid_w, block_m)
        q = _load(qkv + head, token, exists, 3 * dim, head_dim, block_d)
        weights = _softmax(q, k, key_exists, head_dim)
        result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        _store(out + head, result, token, exists, dim, head_dim, block_d)


@triton.jit(do_not_specialize=SIZES)
def _attend_backward(
    gradient: tl.tensor,
    qkv: tl.tensor,
    qkv_gradient: tl.tensor,
    height: int,
    width: int,
    heads: int,
    grid_h: int,
    grid_w: int,
    head_dim: tl.constexpr,
    block_n: tl.constexpr,
    block_m: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Gradients of one head in one grid: of the queries as they come, of keys and values sums over all queries."""
    dim = heads * head_dim
    head = tl.program_id(0) % heads * head_dim
    grid = tl.program_id(0) // heads
    key_token, key_exists = _grid(grid, 0, height, width, grid_h, grid_w, block_n)
    k = _load(qkv + dim + head, key_token, key_exists, 3 * dim, head_dim, block_d)
    v = _load(qkv + 2 * dim + head, key_token, key_exists, 3 * dim, head_dim, block_d)
    of_k = tl.zeros([block_n, block_d], tl.float32)
    of_v = tl.zeros([block_n, block_d], tl.float32)
    for first in tl.range(0, block_n, block_m, num_stages=1):
        token, exists = _grid(grid, first, height, width, grid_h, grid_w, block_m)
        q = _load(qkv + head, token, exists, 3 * dim, head_dim, block_d)
        given = _load(gradient + head, token, exists, dim, head_dim, block_d)
        weights = _softmax(q, k, key_exists, head_dim)
        of_v = tl.dot(tl.trans(weights.to(q.dtype)), given, of_v, input_precision=PRECISION)
        of_weights = tl.dot(given, tl.trans(v), input_precision=PRECISION)
        mean = tl.sum(weights * of_weights, axis=1)
        of_products = (weights * (of_weights - mean[:, None]) * head_dim**-0.5).to(q.dtype)
        of_k = tl.dot(tl.trans(of_products), q, of_k, input_precision=PRECISION)
        of_q = tl.dot(of_products, k, input_precision=PRECISION)
        _store(qkv_gradient + head, of_q, token, exists, 3 * dim, head_dim, block_d)
    _store(qkv_gradient + dim + head, of_k, key_token, key_exists, 3 * dim, head_dim, block_d)
    _store(qkv_gradient + 2 * dim + head, of_v, key_token, key_exists, 3 * dim, head_dim, block_d)


@triton.jit
def _softmax(q: tl.tensor, k: tl.tensor, key_exists: tl.tensor, head_dim: tl.constexpr) -> tl.tensor:
    """[m, n] in float32, softmax(QKᵀ/√head_dim) over the keys that exist; every grid has some."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION) * head_dim**-0.5
    products = tl.where(key_exists[None, :], products, float("-inf"))
    weights = tl.exp(products - tl.max(products, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None]


@triton.jit
def _grid(
    grid: int, first: int, height: int, width: int, grid_h: int, grid_w: int, block: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Numbers of the tokens [block] of a grid from its position ``first`` on, and which of them exist."""
    columns = tl.cdiv(width, grid_w)
    rows = tl.cdiv(height, grid_h)
    position = first + tl.arange(0, block)
    y = grid // columns % rows * grid_h + position // grid_w
    x = grid % columns * grid_w + position % grid_w
    image = (grid // (columns * rows)).to(tl.int64)
    return (image * height + y) * width + x, (position < grid_h * grid_w) & (y < height) & (x < width)


@triton.jit
def _load(
    base: tl.tensor, token: tl.tensor, exists: tl.tensor, stride: int, head_dim: tl.constexpr, block_d: tl.constexpr
) -> tl.tensor:
    """[tokens, block_d], a head's channels of some tokens; zero where there is no token or channel."""
    channel = tl.arange(0, block_d)
    mask = exists[:, None] & (channel < head_dim)[None, :]
    return tl.load(base + token[:, None] * stride + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _store(
    base: tl.tensor,
    value: tl.tensor,
    token: tl.tensor,
    exists: tl.tensor,
    stride: int,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """The inverse of :func:`_load`."""
    channel = tl.arange(0, block_d)
    mask = exists[:, None] & (channel < head_dim)[None, :]
    tl.store(base + token[:, None] * stride + channel[None, :], value.to(base.dtype.element_ty), mask=mask)


@grid_attention.register_fake
def _(qkv: Tensor, num_heads: int, grid_size: int) -> Tensor:
    batch, channels, height, width = qkv.shape
    return qkv.new_empty(batch, height, width, channels // 3).permute(0, 3, 1, 2)


@_grid_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, num_heads: int, grid_size: int) -> Tensor:
    batch, channels, height, width = qkv.shape
    return qkv.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.num_heads, ctx.grid_size = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _grid_attention_backward(gradient, *ctx.saved_tensors, ctx.num_heads, ctx.grid_size), None, None


grid_attention.register_autograd(_backward, setup_context=_keep)
