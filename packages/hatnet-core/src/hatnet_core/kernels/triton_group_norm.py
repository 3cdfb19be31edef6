"""GroupNorm with one group in Triton: mean and variance over channels and positions of a sample (Sec. 3.3).

PyTorch's kernel gives each group to one block of threads, which keeps as many blocks busy as there are samples. Here
several programs share a sample: a first kernel takes count, mean and sum of squared deviations of every split, a
second combines them (Chan, Golub and LeVeque, 1979) and normalises. The backward pass has the same two steps. Maps
are read and written in channels_last; sums are in float32 and in a fixed order, so that results are reproducible.

Imported only where Triton is installed.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hatnet_core.kernels import DTYPES
from hatnet_core.kernels.operator import ceil_div, on_device, power_of_two, register, to_tokens

PROGRAMS = 1024
"""Programs that share the work, about: several per multiprocessor of a large GPU (an H100 has 132)."""

TILE = 4096
"""Values that a program loads at a time, 16 in each of its 256 threads."""

WARPS = 8

SUMMED_CHANNELS = 16
"""Channels of a program that sums the gradients of weight and bias over the splits of all samples."""

SIZES = ("positions", "per_split")
"""Arguments that change with the size of the image; one compiled kernel serves all of them."""


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Normalise each sample: weight · (x - mean) / √(variance + eps) + bias.

    Args:
        x: [B, C, H, W] of float32, bfloat16 or float16; read in channels_last, of which another layout is a copy.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        dtype: of the result, that of ``x`` by default.

    Returns:
        [B, C, H, W] in channels_last; computed in float32.

    Raises:
        ValueError: if ``x`` is of another dtype, or weight or bias of another shape.
    """
    if not weight.shape == bias.shape == x.shape[1:2]:
        shapes = tuple(weight.shape), tuple(bias.shape)
        raise ValueError(f"weight and bias must have the {x.shape[1]} channels of x, got shapes {shapes}")
    if x.dtype not in DTYPES["triton"]:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    return _operator(x, weight.contiguous(), bias.contiguous(), eps, dtype or x.dtype)[0]


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the normalised map, and [2, B] in float32: mean and 1/√(variance + eps) of each sample."""
    tokens, out = to_tokens(x), torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    splits, sizes, blocks = _work(tokens)
    partials = x.new_empty(3, x.shape[0], splits, dtype=torch.float32)
    moments = x.new_empty(2, x.shape[0], dtype=torch.float32)
    with on_device(x):
        _statistics[x.shape[0], splits](tokens, partials, *sizes, **blocks)
        _normalise[x.shape[0], splits](
            tokens, weight, bias, partials, moments, out, eps, *sizes, block_s=power_of_two(splits), **blocks
        )
    return out, moments


def _backward(gradient: Tensor, x: Tensor, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``weight`` and bias, given the ``gradient`` of the normalised map."""
    x_gradient = torch.empty_like(x, memory_format=torch.channels_last)
    tokens, given = to_tokens(x), to_tokens(gradient)
    splits, sizes, blocks = _work(tokens)
    by_channel = x.new_empty(2, x.shape[0] * splits, x.shape[1], dtype=torch.float32)
    by_split = x.new_empty(2, x.shape[0], splits, dtype=torch.float32)
    of_weight, of_bias = torch.empty_like(weight), torch.empty_like(weight)
    with on_device(x):
        _gradient_sums[x.shape[0], splits](given, tokens, weight, moments, by_channel, by_split, *sizes, **blocks)
        _gradient[x.shape[0], splits](
            given, tokens, weight, moments, by_split, x_gradient, *sizes, block_s=power_of_two(splits), **blocks
        )
        _sum_splits[(ceil_div(len(weight), SUMMED_CHANNELS),)](
            by_channel, of_weight, of_bias, x.shape[0] * splits, len(weight), block_c=SUMMED_CHANNELS
        )
    return x_gradient, of_weight, of_bias


def _work(tokens: Tensor) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """Return the splits of a sample, the sizes that kernels take, and their blocks; no split is empty."""
    positions, channels = tokens.shape[1] * tokens.shape[2], tokens.shape[3]
    divisor = channels & -channels  # the largest power of two that divides: no lane of a block is idle
    block_c = min(divisor, 512) if divisor >= 64 else power_of_two(channels)
    block_p = max(1, TILE // block_c)
    wanted = ceil_div(PROGRAMS, max(1, tokens.shape[0]))
    per_split = ceil_div(ceil_div(positions, block_p), wanted) * block_p
    blocks = {"block_p": block_p, "block_c": block_c, "num_warps": WARPS}
    return ceil_div(positions, per_split), (positions, channels, per_split), blocks


@triton.jit(do_not_specialize=SIZES)
def _statistics(
    x: tl.tensor,
    partials: tl.tensor,
    positions: int,
    channels: int,
    per_split: int,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Count, mean and sum of squared deviations of a split → ``partials`` [3, B, splits].

    Sums are of the differences to the mean of the split's first tile, so that a mean far above the deviation costs no
    digits.
    """
    sample, split = tl.program_id(0), tl.program_id(1)
    first, last = split * per_split, tl.minimum((split + 1) * per_split, positions)
    first_token = sample.to(tl.int64) * positions
    at, in_channels = _tile(0, channels, block_p, block_c)
    seen = _seen(first, last, in_channels, block_p)
    value = tl.load(x + (first_token + first) * channels + at, mask=seen, other=0.0).to(tl.float32)
    origin = tl.sum(value) / tl.sum(seen.to(tl.float32))
    plain = tl.zeros([block_p, block_c], tl.float32)
    squares = tl.zeros([block_p, block_c], tl.float32)
    for begin in range(0, channels, block_c):
        at, in_channels = _tile(begin, channels, block_p, block_c)
        for start in range(first, last, block_p):
            seen = _seen(start, last, in_channels, block_p)
            value = tl.load(x + (first_token + start) * channels + at, mask=seen, other=0.0).to(tl.float32)
            value = tl.where(seen, value - origin, 0.0)
            plain += value
            squares += value * value
    size = ((last - first) * channels).to(tl.float32)
    mean = tl.sum(plain) / size
    plane = tl.num_programs(0) * tl.num_programs(1)
    partials += sample * tl.num_programs(1) + split
    tl.store(partials, size)
    tl.store(partials + plane, origin + mean)
    tl.store(partials + 2 * plane, tl.maximum(tl.sum(squares) - size * mean * mean, 0.0))


@triton.jit(do_not_specialize=SIZES)
def _normalise(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    partials: tl.tensor,
    moments: tl.tensor,
    out: tl.tensor,
    eps: float,
    positions: int,
    channels: int,
    per_split: int,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
) -> None:
    """Combine the statistics of a sample, normalise one of its splits; the first split stores ``moments`` [2, B]."""
    sample, split = tl.program_id(0), tl.program_id(1)
    splits = tl.arange(0, block_s)
    plane = tl.num_programs(0) * tl.num_programs(1)
    statistics = partials + sample * tl.num_programs(1) + splits
    real = splits < tl.num_programs(1)
    count = tl.load(statistics, mask=real, other=0.0)
    means = tl.load(statistics + plane, mask=real, other=0.0)
    squares = tl.load(statistics + 2 * plane, mask=real, other=0.0)
    size = tl.sum(count)
    mean = tl.sum(count * means) / size
    variance = tl.sum(squares + count * (means - mean) * (means - mean)) / size
    factor = 1 / tl.sqrt(variance + eps)
    if split == 0:
        tl.store(moments + sample, mean)
        tl.store(moments + tl.num_programs(0) + sample, factor)

    first, last = split * per_split, tl.minimum((split + 1) * per_split, positions)
    first_token = sample.to(tl.int64) * positions
    for begin in range(0, channels, block_c):
        at, in_channels = _tile(begin, channels, block_p, block_c)
        channel = begin + tl.arange(0, block_c)
        scale = tl.load(weight + channel, mask=in_channels, other=0.0).to(tl.float32) * factor
        shift = tl.load(bias + channel, mask=in_channels, other=0.0).to(tl.float32)
        for start in range(first, last, block_p):
            seen = _seen(start, last, in_channels, block_p)
            base = (first_token + start) * channels
            value = tl.load(x + base + at, mask=seen, other=0.0).to(tl.float32)
            result = (value - mean) * scale[None, :] + shift[None, :]
            tl.store(out + base + at, result.to(out.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=SIZES)
def _gradient_sums(
    gradient: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    moments: tl.tensor,
    by_channel: tl.tensor,
    by_split: tl.tensor,
    positions: int,
    channels: int,
    per_split: int,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Sum over a split: g and g·x̂ → ``by_channel`` [2, B·splits, C], of gγ and gγ·x̂ → ``by_split`` [2, …]."""
    sample, split = tl.program_id(0), tl.program_id(1)
    mean, factor = tl.load(moments + sample), tl.load(moments + tl.num_programs(0) + sample)
    first, last = split * per_split, tl.minimum((split + 1) * per_split, positions)
    first_token = sample.to(tl.int64) * positions
    plane = tl.num_programs(0) * tl.num_programs(1)
    index = sample * tl.num_programs(1) + split
    row = by_channel + index.to(tl.int64) * channels
    total, total_weighted = 0.0, 0.0
    for begin in range(0, channels, block_c):
        at, in_channels = _tile(begin, channels, block_p, block_c)
        plain = tl.zeros([block_p, block_c], tl.float32)
        weighted = tl.zeros([block_p, block_c], tl.float32)
        for start in range(first, last, block_p):
            seen = _seen(start, last, in_channels, block_p)
            base = (first_token + start) * channels
            value = tl.load(x + base + at, mask=seen, other=0.0).to(tl.float32)
            given = tl.load(gradient + base + at, mask=seen, other=0.0).to(tl.float32)
            plain += given
            weighted += given * ((value - mean) * factor)
        of_bias, of_weight = tl.sum(plain, axis=0), tl.sum(weighted, axis=0)
        channel = begin + tl.arange(0, block_c)
        tl.store(row + channel, of_bias, mask=in_channels)
        tl.store(row + plane.to(tl.int64) * channels + channel, of_weight, mask=in_channels)
        scale = tl.load(weight + channel, mask=in_channels, other=0.0).to(tl.float32)
        total += tl.sum(scale * of_bias)
        total_weighted += tl.sum(scale * of_weight)
    tl.store(by_split + index, total)
    tl.store(by_split + plane + index, total_weighted)


@triton.jit(do_not_specialize=SIZES)
def _gradient(
    gradient: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    moments: tl.tensor,
    by_split: tl.tensor,
    x_gradient: tl.tensor,
    positions: int,
    channels: int,
    per_split: int,
    block_p: tl.constexpr,
    block_c: tl.constexpr,
    block_s: tl.constexpr,
) -> None:
    """(gγ - mean of gγ - x̂ · mean of gγx̂) / √(variance + eps) for one split, the means over its sample."""
    sample, split = tl.program_id(0), tl.program_id(1)
    splits = tl.arange(0, block_s)
    plane = tl.num_programs(0) * tl.num_programs(1)
    sums = by_split + sample * tl.num_programs(1) + splits
    real = splits < tl.num_programs(1)
    size = 1.0 * positions * channels
    plain = tl.sum(tl.load(sums, mask=real, other=0.0)) / size
    weighted = tl.sum(tl.load(sums + plane, mask=real, other=0.0)) / size

    mean, factor = tl.load(moments + sample), tl.load(moments + tl.num_programs(0) + sample)
    first, last = split * per_split, tl.minimum((split + 1) * per_split, positions)
    first_token = sample.to(tl.int64) * positions
    for begin in range(0, channels, block_c):
        at, in_channels = _tile(begin, channels, block_p, block_c)
        channel = begin + tl.arange(0, block_c)
        scale = tl.load(weight + channel, mask=in_channels, other=0.0).to(tl.float32)
        for start in range(first, last, block_p):
            seen = _seen(start, last, in_channels, block_p)
            base = (first_token + start) * channels
            value = tl.load(x + base + at, mask=seen, other=0.0).to(tl.float32)
            given = tl.load(gradient + base + at, mask=seen, other=0.0).to(tl.float32)
            result = (given * scale[None, :] - plain - (value - mean) * factor * weighted) * factor
            tl.store(x_gradient + base + at, result.to(x_gradient.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["rows"])
def _sum_splits(
    by_channel: tl.tensor, of_weight: tl.tensor, of_bias: tl.tensor, rows: int, channels: int, block_c: tl.constexpr
) -> None:
    """Sum ``by_channel`` [2, rows, C] over its rows: the first half is the gradient of the bias."""
    channel = tl.program_id(0) * block_c + tl.arange(0, block_c)
    in_channels = (channel < channels)[None, :]
    plain = tl.zeros([128, block_c], tl.float32)
    weighted = tl.zeros([128, block_c], tl.float32)
    for first in range(0, rows, 128):
        row = first + tl.arange(0, 128)
        at = row.to(tl.int64)[:, None] * channels + channel[None, :]
        seen = (row < rows)[:, None] & in_channels
        plain += tl.load(by_channel + at, mask=seen, other=0.0)
        weighted += tl.load(
            by_channel + (row.to(tl.int64) + rows)[:, None] * channels + channel[None, :], mask=seen, other=0.0
        )
    in_channels = channel < channels
    tl.store(of_bias + channel, tl.sum(plain, axis=0).to(of_bias.dtype.element_ty), mask=in_channels)
    tl.store(of_weight + channel, tl.sum(weighted, axis=0).to(of_weight.dtype.element_ty), mask=in_channels)


@triton.jit
def _tile(begin: int, channels: int, block_p: tl.constexpr, block_c: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Offsets [block_p, block_c] of a tile whose channels start at ``begin``, and which of [block_c] exist."""
    channel = begin + tl.arange(0, block_c)
    return tl.arange(0, block_p)[:, None] * channels + channel[None, :], channel < channels


@triton.jit
def _seen(start: int, last: int, in_channels: tl.tensor, block_p: tl.constexpr) -> tl.tensor:
    """[block_p, block_c], which values of the tile that begins at position ``start`` belong to the split."""
    return (start + tl.arange(0, block_p) < last)[:, None] & in_channels[None, :]


def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    return out, x.new_empty(2, x.shape[0], dtype=torch.float32)


def _fake_backward(gradient: Tensor, x: Tensor, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_gradient = torch.empty_like(x, memory_format=torch.channels_last)
    return x_gradient, torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs[:2]
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return (*backward(gradient, *ctx.saved_tensors), None, None)


_operator = register("group_norm", _forward, _backward, _fake, _fake_backward, _keep, _gradients)
