"""SiLU → K×K depthwise convolution → SiLU in one Triton kernel: the inside of the MLP on a GPU (Sec. 3.3).

The map of E·C channels is the largest of a block, and these three steps do little with each value. One after the
other they read and write it three times, here once. A program goes down a strip of the map, a few columns and one
block of channels wide. It takes SiLU of each value of a row once and adds the row to the K rows of the result in
progress. These stay in registers, as do the values of neighbouring columns. The backward pass keeps only the input
and goes down the strips in the same way. Maps are read and written in channels_last; sums are in float32 and in
a fixed order, so that results are reproducible.

Imported only where Triton is installed.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped, untyped-decorator, no-untyped-call, assignment"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hatnet_core.kernels import DTYPES
from hatnet_core.kernels.operator import ceil_div, on_device, power_of_two, register, to_tokens

PROGRAMS = 8192
"""Strips are cut until there are about as many; a program is one warp."""

MIN_ROWS = 8
"""A strip reads K - 1 rows of its neighbours; a shorter one would do little else."""

SUMMED_CHANNELS = 64
"""Channels of a program that sums the weight gradient over what the programs before it found."""

LANES = 32
"""Threads of a program."""


def activated_depthwise(h: Tensor, weight: Tensor) -> Tensor:
    """SiLU(Depthwise(SiLU(h))), stride 1, zero-padded, without bias.

    Args:
        h: [B, C, H, W] of float32, bfloat16 or float16; read in channels_last, of which another layout is a copy.
        weight: [C, 1, K, K], K odd, the dtype of ``h``.

    Returns:
        [B, C, H, W] in channels_last, the dtype of ``h``; computed in float32, in half precision with the GPU's
        approximate tanh (relative error 2⁻¹¹).

    Raises:
        ValueError: if a dtype or the shape of ``weight`` is another.
    """
    if h.dtype not in DTYPES["triton"]:
        raise ValueError(f"h must be float32, bfloat16 or float16, got {h.dtype}")
    if weight.dtype != h.dtype:
        raise ValueError(f"weight must have the dtype of h, {h.dtype}, got {weight.dtype}")
    channels, side = h.shape[1], weight.shape[-1]
    if side % 2 == 0 or weight.shape != (channels, 1, side, side):
        raise ValueError(f"weight must be [{channels}, 1, K, K] of an odd K, got {list(weight.shape)}")
    return _operator(h, weight)


def _forward(h: Tensor, weight: Tensor) -> Tensor:
    out = torch.empty_like(h, memory_format=torch.channels_last)
    _down(h, _taps(weight), h, out, "forward")
    return out


def _backward(gradient: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``h`` and ``weight``, given the ``gradient`` of the output."""
    mixed_gradient, h_gradient = (torch.empty_like(h, memory_format=torch.channels_last) for _ in range(2))
    taps = _taps(weight)
    _down(h, taps, gradient, mixed_gradient, "gradient of mixed")
    _down(mixed_gradient, taps, h, h_gradient, "gradient of h")
    return h_gradient, _of_weight(mixed_gradient, h, weight)


def _taps(weight: Tensor) -> Tensor:
    """[C, 1, K, K] → [K·K, C], contiguous."""
    return weight.flatten(1).t().contiguous()


def _approximate(h: Tensor) -> bool:
    """Return whether sigmoids use the approximate tanh, an instruction of NVIDIA's GPUs."""
    return h.device.type == "cuda" and h.dtype != torch.float32 and torch.version.hip is None


def _block_c(channels: int, values: int) -> int:
    """Channels of a program that has ``values`` of them in each thread."""
    return min(LANES * values, max(16, power_of_two(channels)))


def _columns(width: int, kernel: int, forward: bool) -> int:
    """Columns of a strip: four share more taps and sigmoids, two fit more maps and leave more registers."""
    return 4 if forward and kernel == 3 and ceil_div(width, 4) * 4 <= ceil_div(width, 2) * 2 else 2


def _down(source: Tensor, taps: Tensor, other: Tensor, out: Tensor, step: str) -> None:
    """Launch :func:`_strips` over all maps [B, C, H, W]."""
    batch, channels, height, width = out.shape
    kernel = round(len(taps) ** 0.5)
    cols, block_c = _columns(width, kernel, step == "forward"), _block_c(channels, 8)
    across = batch * ceil_div(channels, block_c) * ceil_div(width, cols)
    strips = max(1, min(PROGRAMS // max(1, across), height // MIN_ROWS))
    rows = ceil_div(height, strips)
    with on_device(out):
        _strips[(across * ceil_div(height, rows),)](
            to_tokens(source), taps, to_tokens(other), out, height, width, channels, rows,
            step=step, k=kernel, cols=cols, block_c=block_c, approximate=_approximate(out), num_warps=1,
        )  # fmt: skip


def _of_weight(mixed_gradient: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """[C, 1, K, K], the weight gradients of :func:`_weight_gradient`, summed over programs."""
    batch, channels, height, width = h.shape
    kernel = weight.shape[-1]
    cols, block_c = _columns(width, kernel, False), _block_c(channels, 4)
    tap_rows = kernel if kernel == 3 else 1  # K² sums and K rows of values have to fit into registers
    columns = ceil_div(width, cols)
    across = ceil_div(channels, block_c) * (kernel // tap_rows) * columns
    images = max(1, ceil_div(batch, max(1, PROGRAMS // 4 // across)))
    groups = ceil_div(batch, images)
    partials = h.new_empty(groups * columns, kernel * kernel, channels, dtype=torch.float32)
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    with on_device(h):
        _weight_gradient[(across * groups,)](
            to_tokens(mixed_gradient), to_tokens(h), partials, batch, height, width, channels, images,
            k=kernel, cols=cols, tap_rows=tap_rows, block_c=block_c, approximate=_approximate(h), num_warps=1,
        )  # fmt: skip
        _sum_partials[(kernel * kernel, ceil_div(channels, SUMMED_CHANNELS))](
            partials, out, groups * columns, channels, kernel * kernel, block_c=SUMMED_CHANNELS
        )
    return out


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
    cols: tl.constexpr,
    block_c: tl.constexpr,
    approximate: tl.constexpr,
) -> None:
    """One strip of a depthwise convolution, by ``step``, with M = Depthwise(SiLU(h)).

    - ``forward``: SiLU(M); ``source`` is h.
    - ``gradient of mixed``: g·SiLU'(M); ``source`` is h, ``other`` is g.
    - ``gradient of h``: Depthwiseᵀ(``source``)·SiLU'(h); ``source`` is the gradient of M, ``other`` is h.
    """
    radius: tl.constexpr = k // 2
    channel, in_channels, program = _share(tl.program_id(0), channels, block_c)
    left, program = program % tl.cdiv(width, cols) * cols, program // tl.cdiv(width, cols)
    strips = tl.cdiv(height, rows)
    top = program % strips * rows
    image = (program // strips).to(tl.int64) * height
    empty = tl.zeros([block_c], tl.float32)
    sums = (empty,) * (k * cols)  # by row of the result, row - radius … row + radius, then by column
    for row in range(top - radius, tl.minimum(top + rows, height) + radius):
        begin = (image + row) * width * channels
        values = ()
        for i in tl.static_range(cols + k - 1):
            x = left + i - radius
            exists = in_channels & (x >= 0) & (x < width) & (row >= 0) & (row < height)
            value = tl.load(source + begin + x * channels + channel, mask=exists, other=0.0).to(tl.float32)
            if step != "gradient of h":
                value *= _sigmoid(value, approximate)
            values = values + (value,)  # noqa: RUF005  Triton's tuples cannot be unpacked
        added = ()
        for down in tl.static_range(k):
            line = ()
            for c in tl.static_range(cols):
                line = line + (sums[down * cols + c],)  # noqa: RUF005
            for across in tl.static_range(k):
                number = (k - 1 - down) * k + across
                if step == "gradient of h":
                    number = k * k - 1 - number
                tap = tl.load(taps + number * channels + channel, mask=in_channels, other=0.0).to(tl.float32)
                new = ()
                for c in tl.static_range(cols):
                    new = new + (line[c] + values[c + across] * tap,)  # noqa: RUF005
                line = new
            added = added + line
        if row - radius >= top:
            for c in tl.static_range(cols):
                at = begin - radius * width * channels + (left + c) * channels + channel
                exists = in_channels & (left + c < width)
                result: tl.tensor = added[c]
                if step == "forward":
                    result *= _sigmoid(result, approximate)
                else:
                    factor = tl.load(other + at, mask=exists, other=0.0).to(tl.float32)
                    if step == "gradient of mixed":
                        result = factor * _derivative(result, approximate)
                    else:
                        result *= _derivative(factor, approximate)
                tl.store(out + at, result.to(out.dtype.element_ty), mask=exists)
        sums = added[cols:] + (empty,) * cols


@triton.jit(do_not_specialize=["batch", "height", "width", "images"])
def _weight_gradient(
    mixed_gradient: tl.tensor,
    h: tl.tensor,
    partials: tl.tensor,
    batch: int,
    height: int,
    width: int,
    channels: int,
    images: int,
    k: tl.constexpr,
    cols: tl.constexpr,
    tap_rows: tl.constexpr,
    block_c: tl.constexpr,
    approximate: tl.constexpr,
) -> None:
    """Gradient of ``tap_rows`` rows of the kernels from a few columns of some images → ``partials`` [groups, K², C].

    The last ``tap_rows`` rows of SiLU(h) stay in registers: those that the taps bring to the current row of the
    result.
    """
    radius: tl.constexpr = k // 2
    wide: tl.constexpr = cols + k - 1
    channel, in_channels, program = _share(tl.program_id(0), channels, block_c)
    first_tap, program = program % (k // tap_rows) * tap_rows, program // (k // tap_rows)
    group = program
    left, program = program % tl.cdiv(width, cols) * cols, program // tl.cdiv(width, cols)
    empty = tl.zeros([block_c], tl.float32)
    sums = (empty,) * (tap_rows * k)
    first = program * images
    for n in range(tl.minimum(images, batch - first)):
        image = (first.to(tl.int64) + n) * height
        window = (empty,) * (tap_rows * wide)
        for y in range(1 - tap_rows, height):
            row = y + first_tap + tap_rows - 1 - radius
            line = ()
            for i in tl.static_range(wide):
                x = left + i - radius
                exists = in_channels & (x >= 0) & (x < width) & (row >= 0) & (row < height)
                at = (image + row) * width * channels + x * channels + channel
                value = tl.load(h + at, mask=exists, other=0.0).to(tl.float32)
                line = line + (value * _sigmoid(value, approximate),)  # noqa: RUF005
            window = window[wide:] + line
            given = ()
            for c in tl.static_range(cols):
                exists = in_channels & (left + c < width) & (y >= 0)
                at = (image + y) * width * channels + (left + c) * channels + channel
                given = given + (tl.load(mixed_gradient + at, mask=exists, other=0.0).to(tl.float32),)  # noqa: RUF005
            added = ()
            for t in tl.static_range(tap_rows):
                for across in tl.static_range(k):
                    total = sums[t * k + across]
                    for c in tl.static_range(cols):
                        total += window[t * wide + c + across] * given[c]
                    added = added + (total,)  # noqa: RUF005
            sums = added
    base = partials + (group.to(tl.int64) * k + first_tap) * k * channels + channel
    for i in tl.static_range(tap_rows * k):
        tl.store(base + i * channels, sums[i], mask=in_channels)


@triton.jit(do_not_specialize=["rows"])
def _sum_partials(
    partials: tl.tensor, out: tl.tensor, rows: int, channels: int, taps: tl.constexpr, block_c: tl.constexpr
) -> None:
    """Sum ``partials`` [rows, taps, C] over its rows → ``out`` [C, taps], for one tap."""
    tap = tl.program_id(0)
    channel = tl.program_id(1) * block_c + tl.arange(0, block_c)
    total = tl.zeros([32, block_c], tl.float32)
    for first in range(0, rows, 32):
        row = first + tl.arange(0, 32)
        at = (row.to(tl.int64) * taps + tap)[:, None] * channels + channel[None, :]
        total += tl.load(partials + at, mask=(row < rows)[:, None] & (channel < channels)[None, :], other=0.0)
    value = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + channel * taps + tap, value, mask=channel < channels)


@triton.jit
def _share(program: int, size: int, block: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Split a program id into positions along an axis, their mask, and the remaining id."""
    blocks = tl.cdiv(size, block)
    place = program % blocks * block + tl.arange(0, block)
    return place, place < size, program // blocks


@triton.jit
def _sigmoid(x: tl.tensor, approximate: tl.constexpr) -> tl.tensor:
    """σ(x): with ``approximate`` by tanh.approx, else to float32's accuracy without a division's care for ranges."""
    if approximate:
        half = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 + 0.5 * half
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def _derivative(x: tl.tensor, approximate: tl.constexpr) -> tl.tensor:
    """SiLU'(x) = σ(x)·(1 + x·(1 - σ(x)))."""
    sigmoid = _sigmoid(x, approximate)
    return sigmoid * (1 + x * (1 - sigmoid))


def _fake(h: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(h, memory_format=torch.channels_last)


def _fake_backward(gradient: Tensor, h: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h_gradient = torch.empty_like(h, memory_format=torch.channels_last)
    return h_gradient, torch.empty_like(weight, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return backward(gradient, *ctx.saved_tensors)


def _flops(h: Sequence[int], weight: Sequence[int]) -> int:
    return 2 * math.prod(h) * weight[-1] ** 2


def _backward_flops(gradient: Sequence[int], h: Sequence[int], weight: Sequence[int]) -> int:
    """Compute the convolution again, and the gradients of its input and weight."""
    return 3 * _flops(h, weight)


_operator = register(
    "activated_depthwise",
    _forward,
    _backward,
    _fake,
    _fake_backward,
    _keep,
    _gradients,
    (_flops, _backward_flops),
)
