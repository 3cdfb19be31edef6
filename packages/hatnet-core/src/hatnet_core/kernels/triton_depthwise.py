"""SiLU → K×K depthwise convolution → SiLU in one kernel of Triton: the inside of the MLP on a GPU (Sec. 3.3).

The map of E·C channels is the largest of a block, and these three steps do little with each of its values; one after
the other they read and write it three times, here once. A program goes down a strip of the map, some columns and some
channels wide: it takes SiLU of each row once per column of the kernel and adds the row to the K rows of the result
that are under way, which stay in registers. The backward pass keeps nothing but the input and goes down the strips in
the same way, twice for the maps and once for the kernels. Maps are read and written in channels_last, sums are in
float32 and in a fixed order, so that a result is the same every time.

Imported only where Triton is installed.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-call, assignment"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hatnet_core.kernels import DTYPES
from hatnet_core.kernels.layout import to_tokens

PROGRAMS = 2048
"""Strips are cut until there are about as many: many for each multiprocessor of a large GPU (an H100 has 132)."""

MIN_ROWS = 8
"""Shorter strips would do mostly what their neighbours do too: a strip begins with K - 1 rows that are not its own."""

THREAD_VALUES = 8
"""Values of a row in each thread, 16 bytes of half precision; K rows of them are under way."""


@torch.library.custom_op("hatnet::activated_depthwise", mutates_args=())
def activated_depthwise(h: Tensor, weight: Tensor) -> Tensor:
    """SiLU(Depthwise(SiLU(h))), stride 1, borders completed by zeros, without bias.

    Args:
        h: [B, C, H, W] of float32, bfloat16 or float16; read in channels_last, of which another layout is a copy.
        weight: [C, 1, K, K], K odd.

    Returns:
        [B, C, H, W] in channels_last, the dtype of ``h``; computed in float32.

    Raises:
        ValueError: if ``h`` is of another dtype, or K is even.
    """
    _check(h, weight)
    out = torch.empty_like(h, memory_format=torch.channels_last)
    _down(h, _taps(weight), h, out, "forward")
    return out


@torch.library.custom_op("hatnet::activated_depthwise_backward", mutates_args=())
def _activated_depthwise_backward(gradient: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``h`` and ``weight``, given the ``gradient`` of the output."""
    mixed_gradient, h_gradient = (torch.empty_like(h, memory_format=torch.channels_last) for _ in range(2))
    _down(h, _taps(weight), gradient, mixed_gradient, "gradient of mixed")
    _down(mixed_gradient, _taps(weight.flip(2, 3)), h, h_gradient, "gradient of h")
    return h_gradient, _of_weight(mixed_gradient, h, weight)


def _check(h: Tensor, weight: Tensor) -> None:
    if h.dtype not in DTYPES["triton"]:
        raise ValueError(f"activated_depthwise in Triton computes float32, bfloat16 and float16, got {h.dtype}")
    if weight.dtype != h.dtype:
        raise ValueError(f"weight must be of the dtype of h, {h.dtype}, got {weight.dtype}")
    channels, side = h.shape[1], weight.shape[-1]
    if side % 2 == 0 or weight.shape != (channels, 1, side, side):
        raise ValueError(f"weight must be [{channels}, 1, K, K] of an odd K, got {list(weight.shape)}")


def _taps(weight: Tensor) -> Tensor:
    """[C, 1, K, K] → [K·K, C], contiguous."""
    return weight.flatten(1).t().contiguous()


def _blocks(h: Tensor) -> dict[str, int]:
    """Columns and channels of a strip, and the warps of 32 threads that share its rows."""
    block_w = 16 if h.shape[3] > 8 else 8
    block_c = min(64, max(16, triton.next_power_of_2(h.shape[1])))
    return {"block_w": block_w, "block_c": block_c, "num_warps": max(1, block_w * block_c // (32 * THREAD_VALUES))}


def _down(source: Tensor, taps: Tensor, other: Tensor, out: Tensor, step: str) -> None:
    """Launch :func:`_strips` over all maps [B, C, H, W]."""
    batch, channels, height, width = out.shape
    blocks = _blocks(out)
    across = batch * triton.cdiv(channels, blocks["block_c"]) * triton.cdiv(width, blocks["block_w"])
    rows = _rows(height, across)
    sizes = (height, width, channels, rows)
    kernel = round(len(taps) ** 0.5)
    with torch.cuda.device_of(out):
        _strips[(across * triton.cdiv(height, rows),)](
            to_tokens(source), taps, to_tokens(other), out, *sizes, step=step, k=kernel, **blocks
        )


def _of_weight(mixed_gradient: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """[C, 1, K, K], the sum over strips of what :func:`_weight_gradient` finds in each."""
    batch, channels, height, width = h.shape
    kernel, blocks = weight.shape[-1], _blocks(h)
    columns = triton.cdiv(width, blocks["block_w"])
    across = triton.cdiv(channels, blocks["block_c"]) * columns * kernel
    rows = _rows(batch * height, across)
    strips = triton.cdiv(batch * height, rows)
    partials = h.new_empty(strips * columns, kernel, kernel, channels, dtype=torch.float32)
    with torch.cuda.device_of(h):
        _weight_gradient[(across * strips,)](
            to_tokens(mixed_gradient), to_tokens(h), partials, batch, height, width, channels, rows, k=kernel, **blocks
        )
    return partials.sum(0).permute(2, 0, 1).unsqueeze(1).to(weight.dtype).contiguous()


def _rows(height: int, across: int) -> int:
    """Rows of a strip, where ``across`` programs work side by side."""
    strips = max(1, min(PROGRAMS // max(1, across), height // MIN_ROWS))
    return max(1, triton.cdiv(height, strips))


@triton.jit(do_not_specialize=["height", "width", "rows"])
def _strips(
    source: tl.tensor,
    taps: tl.tensor,
    other: tl.tensor,
    out: tl.tensor,
    height: int,
    width: int,
    channels: int,
    rows: int,
    step: tl.constexpr,
    k: tl.constexpr,
    block_w: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """One strip of a depthwise convolution, by ``step``, with M = Depthwise(SiLU(h)).

    - ``forward``: SiLU(M); ``source`` is h.
    - ``gradient of mixed``: g·SiLU'(M); ``source`` is h, ``other`` is g.
    - ``gradient of h``: Depthwise(``source``)·SiLU'(h); ``source`` is the gradient of M, ``other`` is h, and the
      kernels are turned by half a circle.
    """
    radius: tl.constexpr = k // 2
    program = tl.program_id(0)
    channel, in_channels, program = _share(program, channels, block_c)
    column, in_columns, program = _share(program, width, block_w)
    strips = tl.cdiv(height, rows)
    top = program % strips * rows
    image = (program // strips).to(tl.int64) * height
    here = in_columns[:, None] & in_channels[None, :]
    # as wide as a row, since what every thread reads for itself needs no exchange between threads
    tap_at = tl.broadcast_to(channel[None, :], [block_w, block_c])
    tap_exists = tl.broadcast_to(in_channels[None, :], [block_w, block_c])

    empty = tl.zeros([block_w, block_c], tl.float32)
    sums = (empty,) * k  # of the rows row - radius … row + radius of the result
    for row in range(top - radius, tl.minimum(top + rows, height) + radius):
        begin = (image + row) * width * channels
        for across in tl.static_range(k):
            x = column + across - radius
            exists = (x >= 0) & (x < width) & (row >= 0) & (row < height)
            at = begin + (x[:, None] * channels + channel[None, :])
            value = tl.load(source + at, mask=exists[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
            if step != "gradient of h":
                value *= tl.sigmoid(value)
            added = ()
            for down in tl.static_range(k):
                number = (k - 1 - down) * k + across
                tap = tl.load(taps + number * channels + tap_at, mask=tap_exists, other=0.0)
                added += (sums[down] + value * tap.to(tl.float32),)
            sums = added
        if row - radius >= top:
            at = begin - radius * width * channels + (column[:, None] * channels + channel[None, :])
            result = sums[0]
            if step == "forward":
                result *= tl.sigmoid(result)
            elif step == "gradient of mixed":
                result = _derivative(result) * tl.load(other + at, mask=here, other=0.0).to(tl.float32)
            else:
                result *= _derivative(tl.load(other + at, mask=here, other=0.0).to(tl.float32))
            tl.store(out + at, result.to(out.dtype.element_ty), mask=here)
        sums = sums[1:] + (empty,)  # noqa: RUF005  Triton's tuples cannot be unpacked


@triton.jit(do_not_specialize=["batch", "height", "width", "rows"])
def _weight_gradient(
    mixed_gradient: tl.tensor,
    h: tl.tensor,
    partials: tl.tensor,
    batch: int,
    height: int,
    width: int,
    channels: int,
    rows: int,
    k: tl.constexpr,
    block_w: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    """Gradient of one row of the kernels from one strip of the rows of all maps → ``partials`` [strips, K, K, C].

    SiLU(h) is taken once, and the gradient of the convolution's result is looked up where each tap carried it.
    """
    radius: tl.constexpr = k // 2
    program = tl.program_id(0)
    channel, in_channels, program = _share(program, channels, block_c)
    down, program = program % k, program // k
    strip = program
    column, in_columns, program = _share(program, width, block_w)
    first = program * rows
    last = tl.minimum(first + rows, batch * height)

    sums = (tl.zeros([block_w, block_c], tl.float32),) * k
    for step in range(last - first):
        row = first + step
        begin = row.to(tl.int64) * width * channels
        at = begin + (column[:, None] * channels + channel[None, :])
        value = tl.load(h + at, mask=in_columns[:, None] & in_channels[None, :], other=0.0).to(tl.float32)
        value *= tl.sigmoid(value)
        to = row % height + radius - down
        begin += (radius - down) * width * channels
        added = ()
        for across in tl.static_range(k):
            x = column + radius - across
            exists = (x >= 0) & (x < width) & (to >= 0) & (to < height)
            at = begin + (x[:, None] * channels + channel[None, :])
            given = tl.load(mixed_gradient + at, mask=exists[:, None] & in_channels[None, :], other=0.0)
            added += (sums[across] + value * given.to(tl.float32),)
        sums = added
    partials += (strip * k + down) * k * channels + channel
    for across in tl.static_range(k):
        tl.store(partials + across * channels, tl.sum(sums[across], axis=0), mask=in_channels)


@triton.jit
def _share(program: int, size: int, block: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The places along an axis that a program works on, which of them exist, and its number along the other axes."""
    blocks = tl.cdiv(size, block)
    place = program % blocks * block + tl.arange(0, block)
    return place, place < size, program // blocks


@triton.jit
def _derivative(x: tl.tensor) -> tl.tensor:
    """SiLU'(x) = σ(x)·(1 + x·(1 - σ(x)))."""
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


@activated_depthwise.register_fake
def _(h: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(h, memory_format=torch.channels_last)


@_activated_depthwise_backward.register_fake
def _(gradient: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(h, memory_format=torch.channels_last), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return _activated_depthwise_backward(gradient, *ctx.saved_tensors)


activated_depthwise.register_autograd(_backward, setup_context=_keep)
