"""Both attentions of H-MHSA in Triton: inside G1×G1 grids (Eq. 6-8) and to the pooled map (Eq. 11-13).

PyTorch's fused attention needs the positions of a grid side by side. Queries, keys, values, the result and all their
gradients are copied into that order or out of it, and grids past the border need a mask. Here one program per grid and
head reads its rows of the channels_last map and writes the result in place. Positions outside the map are neither
read, nor attended to, nor written. The residual of Eq. 9 and Eq. 14 is added where the result is
written. The backward pass keeps only the input and recomputes the attention weights.

Imported only where Triton is installed.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hatnet_core.kernels.operator import ceil_div, on_device, power_of_two, register, to_tokens

LIMITS = {torch.float32: (64, 4096), torch.bfloat16: (256, 8192), torch.float16: (256, 8192)}
"""By dtype, the most positions of a grid and the most values of a head's keys in it, both rounded up to powers of two.

Keys and values of a whole grid are loaded at once. Within these limits the compiled kernels need at most 72 KB of
shared memory; GPUs since Ampere grant 99 KB or more.
"""

POOLED_POSITIONS = 64
"""The most pooled positions that a program loads at once; 49 at 224×224."""

QUERIES = 64
"""Positions whose queries a program of the pooled attention takes at a time."""

PRECISION = tl.constexpr("tf32x3")
"""A float32 product is computed as three of tensor cores, to nearly the accuracy of float32; ignored for other dtypes.

Without tensor cores (``ieee``) the compiler needs minutes, and the kernel more registers than there are.
"""

SIZES = ("height", "width", "heads", "grid_h", "grid_w")
"""Arguments that change with the model and the image; one compiled kernel serves all of them."""


def supports(qkv: Tensor, num_heads: int, grid_size: int) -> bool:
    """Return whether :func:`grid_attention` has room for these arguments."""
    grid, head_dim = _shape(qkv, num_heads, grid_size)
    positions, values = LIMITS.get(qkv.dtype, (0, 0))
    block_n, block_d = _padded(grid[0] * grid[1]), _padded(head_dim)
    return block_n <= positions and block_n * block_d <= values


def supports_pooled(q: Tensor, kv: Tensor, num_heads: int) -> bool:
    """Return whether :func:`pooled_attention` has room for these arguments; in float32 its gradient would not fit."""
    positions, head_dim = kv.shape[2] * kv.shape[3], q.shape[1] // num_heads
    half = q.dtype == kv.dtype and q.dtype in (torch.bfloat16, torch.float16)
    return half and positions <= POOLED_POSITIONS and _padded(head_dim) <= 64


def grid_attention(qkv: Tensor, num_heads: int, grid_size: int, residual: Tensor | None = None) -> Tensor:
    """softmax(Q·Kᵀ/√head_dim)·V inside each G1×G1 grid, per head (Eq. 6-8), plus ``residual`` (Eq. 9).

    The last grids at the right and bottom are what remains of the map; where a side of the map is below G1, so is the
    grid's. Products are of the dtype of ``qkv``; their sums, the softmax and the sum with ``residual`` of float32.

    Args:
        qkv: [B, 3C, H, W] of float32, bfloat16 or float16, channels laid out as (q | k | v) × heads × head_dim; read
            in channels_last, of which another layout is a copy.
        num_heads: number of heads; divides C.
        grid_size: G1, side of a grid in positions.
        residual: [B, C, H, W], of any dtype.

    Returns:
        [B, C, H, W] in channels_last, the dtype of ``qkv``.

    Raises:
        ValueError: if ``qkv`` is of another dtype, or its grids are beyond :data:`LIMITS`, as 16×16 positions of 64
            channels are.
    """
    if not supports(qkv, num_heads, grid_size):
        (grid_h, grid_w), head_dim = _shape(qkv, num_heads, grid_size)
        raise ValueError(
            "grids must have at most 256 positions and 8192 values of keys (in float32 64 and 4096), "
            f"got {grid_h}×{grid_w} positions of {head_dim} channels in {qkv.dtype}"
        )
    return _grid_operator(qkv, num_heads, grid_size, residual)


def pooled_attention(q: Tensor, kv: Tensor, num_heads: int, residual: Tensor | None = None) -> Tensor:
    """softmax(Q·Kᵀ/√head_dim)·V of all positions to all pooled positions (Eq. 11-13), plus ``residual`` (Eq. 14).

    Args:
        q: [B, C, H, W] of bfloat16 or float16, channels laid out as heads × head_dim; read in channels_last.
        kv: [B, 2C, H', W'] of the same dtype, channels laid out as (k | v) × heads × head_dim; at most
            :data:`POOLED_POSITIONS` positions.
        num_heads: number of heads; divides C.
        residual: [B, C, H, W], of any dtype.

    Returns:
        [B, C, H, W] in channels_last, the dtype of ``q``.

    Raises:
        ValueError: if the arguments are not those that :func:`supports_pooled` accepts.
    """
    if not supports_pooled(q, kv, num_heads):
        raise ValueError(
            f"q and kv must be bfloat16 or float16, with at most {POOLED_POSITIONS} pooled positions and 64 channels "
            f"per head, got {list(kv.shape)} in {kv.dtype} with {num_heads} heads and q in {q.dtype}"
        )
    return _pooled_operator(q, kv, num_heads, residual)


def _forward(qkv: Tensor, num_heads: int, grid_size: int, residual: Tensor | None) -> Tensor:
    sizes, blocks, programs = _work(qkv, num_heads, grid_size)
    batch, channels, height, width = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    added = out if residual is None else to_tokens(residual)
    with on_device(qkv):
        _attend[(programs,)](to_tokens(qkv), added, out, *sizes, add=residual is not None, **blocks)
    return out.permute(0, 3, 1, 2)


def _backward(gradient: Tensor, qkv: Tensor, num_heads: int, grid_size: int) -> Tensor:
    """Gradient of ``qkv``, given the ``gradient`` of the result."""
    sizes, blocks, programs = _work(qkv, num_heads, grid_size)
    tokens = to_tokens(qkv)
    qkv_gradient = torch.empty_like(tokens)
    with on_device(qkv):
        _attend_backward[(programs,)](to_tokens(gradient), tokens, qkv_gradient, *sizes, **blocks)
    return qkv_gradient.permute(0, 3, 1, 2)


def _pooled_forward(q: Tensor, kv: Tensor, num_heads: int, residual: Tensor | None) -> Tensor:
    batch, channels, height, width = q.shape
    queries, keys = height * width, kv.shape[2] * kv.shape[3]
    out = q.new_empty(batch, height, width, channels)
    added = out if residual is None else to_tokens(residual)
    grid = batch * num_heads * ceil_div(queries, QUERIES)
    with on_device(q):
        _attend_pooled[(grid,)](
            to_tokens(q), to_tokens(kv), added, out, queries, keys, num_heads,
            add=residual is not None, **_pooled_blocks(q, num_heads),
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def _pooled_backward(gradient: Tensor, q: Tensor, kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """Gradients of ``q`` and ``kv``, given the ``gradient`` of the result."""
    batch, _, height, width = q.shape
    queries, keys = height * width, kv.shape[2] * kv.shape[3]
    tokens, pooled = to_tokens(q), to_tokens(kv)
    q_gradient, kv_gradient = torch.empty_like(tokens), torch.empty_like(pooled)
    with on_device(q):
        _attend_pooled_backward[(batch * num_heads,)](
            to_tokens(gradient), tokens, pooled, q_gradient, kv_gradient, queries, keys, num_heads,
            **_pooled_blocks(q, num_heads),
        )  # fmt: skip
    return q_gradient.permute(0, 3, 1, 2), kv_gradient.permute(0, 3, 1, 2)


def _shape(qkv: Tensor, num_heads: int, grid_size: int) -> tuple[tuple[int, int], int]:
    """Sides of a grid in positions, and channels of a head."""
    _, channels, height, width = qkv.shape
    return (min(grid_size, height), min(grid_size, width)), channels // (3 * num_heads)


def _padded(size: int) -> int:
    """Return the power of two at or above ``size``, at least 16: what matrix products are made of."""
    return max(16, power_of_two(size))


def _work(qkv: Tensor, num_heads: int, grid_size: int) -> tuple[tuple[int, ...], dict[str, int], int]:
    """Sizes and blocks of the kernels, and the number of programs: one for each grid and head."""
    batch, _, height, width = qkv.shape
    (grid_h, grid_w), head_dim = _shape(qkv, num_heads, grid_size)
    block_n = _padded(grid_h * grid_w)
    blocks = {"head_dim": head_dim, "block_n": block_n, "block_m": block_n if block_n <= 64 else 32}
    blocks["block_d"] = _padded(head_dim)
    blocks["num_warps"] = 8 if block_n > 64 or qkv.dtype == torch.float32 else 4
    programs = batch * ceil_div(height, grid_h) * ceil_div(width, grid_w) * num_heads
    return (height, width, num_heads, grid_h, grid_w), blocks, programs


def _pooled_blocks(q: Tensor, num_heads: int) -> dict[str, int]:
    head_dim = q.shape[1] // num_heads
    return {"head_dim": head_dim, "block_m": QUERIES, "block_n": POOLED_POSITIONS, "block_d": _padded(head_dim)}


@triton.jit(do_not_specialize=SIZES)
def _attend(
    qkv: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    height: int,
    width: int,
    heads: int,
    grid_h: int,
    grid_w: int,
    add: tl.constexpr,
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
        if add:
            result += _load(residual + head, token, exists, dim, head_dim, block_d).to(tl.float32)
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
    """Gradients of one head in one grid: of the queries block by block, of keys and values sums over all queries."""
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
        given = _load(gradient + head, token, exists, dim, head_dim, block_d).to(q.dtype)
        weights = _softmax(q, k, key_exists, head_dim)
        of_q, of_k, of_v = _gradients_of(q, k, v, given, weights, of_k, of_v, head_dim)
        _store(qkv_gradient + head, of_q, token, exists, 3 * dim, head_dim, block_d)
    _store(qkv_gradient + dim + head, of_k, key_token, key_exists, 3 * dim, head_dim, block_d)
    _store(qkv_gradient + 2 * dim + head, of_v, key_token, key_exists, 3 * dim, head_dim, block_d)


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def _attend_pooled(
    q: tl.tensor,
    kv: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    queries: int,
    keys: int,
    heads: int,
    add: tl.constexpr,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Attention of ``block_m`` positions of one sample to all pooled positions, in one head."""
    dim = heads * head_dim
    head = tl.program_id(0) % heads * head_dim
    blocks = tl.cdiv(queries, block_m)
    sample = (tl.program_id(0) // heads // blocks).to(tl.int64)
    position = tl.program_id(0) // heads % blocks * block_m + tl.arange(0, block_m)
    exists, token = position < queries, sample * queries + position
    key = tl.arange(0, block_n)
    key_exists, key_token = key < keys, sample * keys + key
    k = _load(kv + head, key_token, key_exists, 2 * dim, head_dim, block_d)
    v = _load(kv + dim + head, key_token, key_exists, 2 * dim, head_dim, block_d)
    weights = _softmax(_load(q + head, token, exists, dim, head_dim, block_d), k, key_exists, head_dim)
    result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    if add:
        result += _load(residual + head, token, exists, dim, head_dim, block_d).to(tl.float32)
    _store(out + head, result, token, exists, dim, head_dim, block_d)


@triton.jit(do_not_specialize=["queries", "keys", "heads"])
def _attend_pooled_backward(
    gradient: tl.tensor,
    q: tl.tensor,
    kv: tl.tensor,
    q_gradient: tl.tensor,
    kv_gradient: tl.tensor,
    queries: int,
    keys: int,
    heads: int,
    head_dim: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_d: tl.constexpr,
) -> None:
    """Gradients of one head in one sample, in a fixed order over its queries."""
    dim = heads * head_dim
    head = tl.program_id(0) % heads * head_dim
    sample = (tl.program_id(0) // heads).to(tl.int64)
    key = tl.arange(0, block_n)
    key_exists, key_token = key < keys, sample * keys + key
    k = _load(kv + head, key_token, key_exists, 2 * dim, head_dim, block_d)
    v = _load(kv + dim + head, key_token, key_exists, 2 * dim, head_dim, block_d)
    of_k = tl.zeros([block_n, block_d], tl.float32)
    of_v = tl.zeros([block_n, block_d], tl.float32)
    for first in tl.range(0, queries, block_m, num_stages=2):
        position = first + tl.arange(0, block_m)
        exists, token = position < queries, sample * queries + position
        query = _load(q + head, token, exists, dim, head_dim, block_d)
        given = _load(gradient + head, token, exists, dim, head_dim, block_d).to(query.dtype)
        weights = _softmax(query, k, key_exists, head_dim)
        of_q, of_k, of_v = _gradients_of(query, k, v, given, weights, of_k, of_v, head_dim)
        _store(q_gradient + head, of_q, token, exists, dim, head_dim, block_d)
    _store(kv_gradient + head, of_k, key_token, key_exists, 2 * dim, head_dim, block_d)
    _store(kv_gradient + dim + head, of_v, key_token, key_exists, 2 * dim, head_dim, block_d)


@triton.jit
def _gradients_of(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    given: tl.tensor,
    weights: tl.tensor,
    of_k: tl.tensor,
    of_v: tl.tensor,
    head_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Gradient of some queries [m, d], and the sums of those of keys and values [n, d] with their share added."""
    of_v = tl.dot(tl.trans(weights.to(q.dtype)), given, of_v, input_precision=PRECISION)
    of_weights = tl.dot(given, tl.trans(v), input_precision=PRECISION)
    mean = tl.sum(weights * of_weights, axis=1)
    of_products = (weights * (of_weights - mean[:, None]) * head_dim**-0.5).to(q.dtype)
    of_k = tl.dot(tl.trans(of_products), q, of_k, input_precision=PRECISION)
    return tl.dot(of_products, k, input_precision=PRECISION), of_k, of_v


@triton.jit
def _softmax(q: tl.tensor, k: tl.tensor, key_exists: tl.tensor, head_dim: tl.constexpr) -> tl.tensor:
    """[m, n] in float32, softmax(QKᵀ/√head_dim) over the keys that exist; there is always one."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION) * head_dim**-0.5
    products = tl.where(key_exists[None, :], products, float("-inf"))
    weights = tl.exp(products - tl.max(products, axis=1)[:, None])
    return weights * (1 / tl.sum(weights, axis=1))[:, None]


@triton.jit
def _grid(
    grid: int, first: int, height: int, width: int, grid_h: int, grid_w: int, block: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Numbers of the tokens [block] of a grid, from its position ``first``, and which of them exist."""
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
    """Invert :func:`_load`."""
    channel = tl.arange(0, block_d)
    mask = exists[:, None] & (channel < head_dim)[None, :]
    tl.store(base + token[:, None] * stride + channel[None, :], value.to(base.dtype.element_ty), mask=mask)


def _fake(qkv: Tensor, num_heads: int, grid_size: int, residual: Tensor | None) -> Tensor:
    batch, channels, height, width = qkv.shape
    return qkv.new_empty(batch, height, width, channels // 3).permute(0, 3, 1, 2)


def _fake_backward(gradient: Tensor, qkv: Tensor, num_heads: int, grid_size: int) -> Tensor:
    batch, channels, height, width = qkv.shape
    return qkv.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)


def _pooled_fake(q: Tensor, kv: Tensor, num_heads: int, residual: Tensor | None) -> Tensor:
    return torch.empty_like(q, memory_format=torch.channels_last)


def _pooled_fake_backward(gradient: Tensor, q: Tensor, kv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    of_q, of_kv = (torch.empty_like(x, memory_format=torch.channels_last) for x in (q, kv))
    return of_q, of_kv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, ctx.num_heads, ctx.grid_size, residual = inputs
    ctx.dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(qkv)


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_qkv = backward(gradient, *ctx.saved_tensors, ctx.num_heads, ctx.grid_size)
    return of_qkv, None, None, None if ctx.dtype is None else gradient.to(ctx.dtype)


def _pooled_keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, kv, ctx.num_heads, residual = inputs
    ctx.dtype = None if residual is None else residual.dtype
    ctx.save_for_backward(q, kv)


def _pooled_gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    of_q, of_kv = backward(gradient, *ctx.saved_tensors, ctx.num_heads)
    return of_q, of_kv, None, None if ctx.dtype is None else gradient.to(ctx.dtype)


def _flops(qkv: Sequence[int], num_heads: int, grid_size: int, residual: Any = None) -> int:
    """Two products, of whole grids as PyTorch's attention counts them, padding included."""
    batch, channels, height, width = qkv
    grid = min(grid_size, height), min(grid_size, width)
    positions = ceil_div(height, grid[0]) * ceil_div(width, grid[1]) * grid[0] * grid[1]
    return 4 * batch * positions * grid[0] * grid[1] * channels // 3


def _pooled_flops(q: Sequence[int], kv: Sequence[int], num_heads: int, residual: Any = None) -> int:
    batch, channels, height, width = q
    return 4 * batch * height * width * kv[2] * kv[3] * channels


def _backward_flops(gradient: Sequence[int], *arguments: Any) -> int:
    """Five products: the attention weights again, and the gradients of values, weights, queries and keys."""
    return _flops(*arguments) * 5 // 2


def _pooled_backward_flops(gradient: Sequence[int], *arguments: Any) -> int:
    return _pooled_flops(*arguments) * 5 // 2


_grid_operator = register(
    "grid_attention",
    _forward,
    _backward,
    _fake,
    _fake_backward,
    _keep,
    _gradients,
    (_flops, _backward_flops),
)
_pooled_operator = register(
    "pooled_attention",
    _pooled_forward,
    _pooled_backward,
    _pooled_fake,
    _pooled_fake_backward,
    _pooled_keep,
    _pooled_gradients,
    (_pooled_flops, _pooled_backward_flops),
)
