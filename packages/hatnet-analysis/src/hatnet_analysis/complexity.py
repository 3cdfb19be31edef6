"""Complexity of attention in closed form: Eq. 5, Eq. 15, their relatives, and the same products measured.

Arguments, the same in every formula:

- ``height``, ``width``: H and W of the feature map in positions.
- ``dim``: C, number of channels.
- ``heads``: number of heads.
- ``grid_size``: G1, side of a local attention grid in positions.
- ``pool_size``: G2, kernel and stride of the average pooling of keys and values.
- ``window_size``: M, side of a window in positions.
- ``reduction``: R, kernel and stride of the convolution that reduces keys and values.

A formula raises a ValueError if an argument is not a positive integer, or if a size that has to divide H and W does
not: both in Eq. 15, and M and R always. Formulas of H-MHSA other than Eq. 15 take any size and count the padding of
the last grids and pools.

Multiply-adds exclude the output projection W^p (HWC²), normalisation, softmax and pooling, as Eq. 5 and 15 do.
Weights are the attention weights in memory at once, O(H²W²) in Sec. 3. Memory is what PyTorch allocates at the peak of
a forward pass beyond input and parameters: one image, float32, inference, plain products
(``torch.nn.attention.SDPBackend.MATH``), and a map in ``channels_last``, as in the model, where positions are tokens
without a copy. Each docstring lists the tensors of ``hatnet_core.attention`` alive then; nothing is fitted. A fused
attention allocates less.

``growth.py`` measures time and memory; ``flops.py`` counts built models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from inspect import signature
from math import ceil
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from hatnet_analysis.flops import example_image, trace
from hatnet_analysis.tables import Row, column
from hatnet_core import HATNet
from hatnet_core.attention import Attention, HierarchicalAttention, positive_int

P = ParamSpec("P")
T = TypeVar("T")


def _checked(*divisors: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Check that the arguments of a formula are positive integers, of which ``divisors`` divide H and W."""

    def decorate(formula: Callable[P, T]) -> Callable[P, T]:
        names = signature(formula)

        @wraps(formula)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            given = names.bind(*args, **kwargs).arguments
            for name, value in given.items():
                positive_int(name, value)
            height, width = given["height"], given["width"]
            for name in divisors:
                if height % given[name] or width % given[name]:
                    raise ValueError(f"{name} must divide height and width, got {given[name]} and {height}×{width}")
            return formula(*args, **kwargs)

        return checked

    return decorate


def mhsa_macs(height: int, width: int, dim: int) -> int:
    """Multiply-adds of plain MHSA: 3HWC² + 2(HW)²C (Eq. 5)."""
    return mhsa_cost(height, width, dim).macs


@_checked("grid_size", "pool_size")
def h_mhsa_macs(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> int:
    """Multiply-adds of H-MHSA: HWC(4C + 2G1²) + 2(HW/G2²)C(C + HW) (Eq. 15)."""
    return int(_eq15(height, width, dim, grid_size, pool_size))


def _eq15(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> Fraction:
    positions = height * width
    pooled = Fraction(positions, pool_size**2)
    return positions * dim * (4 * dim + 2 * grid_size**2) + 2 * pooled * dim * (dim + positions)


def h_mhsa_macs_padded(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> int:
    """Multiply-adds of H-MHSA at any size: HWC·4C + 2·H'W'·G1²·C + 2·⌈H/G2⌉⌈W/G2⌉·C(C + HW).

    H' = G1·⌈H/G1⌉ and W' = G1·⌈W/G1⌉ include the padding at the right and bottom; a grid is no longer than a side.
    Equal to Eq. 15 where G1 and G2 divide H and W, and at most :func:`h_mhsa_bound` elsewhere.
    """
    return h_mhsa_cost(height, width, dim, grid_size, pool_size).macs


@_checked()
def h_mhsa_bound(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> float:
    """Upper bound of :func:`h_mhsa_macs_padded`: Eq. 15 times (1 + (G−1)/H)(1 + (G−1)/W), G the larger of G1 and G2.

    Eq. 15 is taken unchanged, whole grids or not. A side is padded by less than one grid or pool.
    """
    longest = max(grid_size, pool_size) - 1
    eq15 = _eq15(height, width, dim, grid_size, pool_size)
    return float(eq15 * (1 + Fraction(longest, height)) * (1 + Fraction(longest, width)))


def window_macs(height: int, width: int, dim: int, window_size: int) -> int:
    """Multiply-adds of window attention, as in Swin but without W^p: 3HWC² + 2M²HWC."""
    return window_cost(height, width, dim, window_size).macs


def reduction_macs(height: int, width: int, dim: int, reduction: int) -> int:
    """Multiply-adds of PVT's spatial reduction attention without W^p: 2HWC² + 2(HW/R²)C(C + HW).

    Queries take HWC², the convolution that reduces (kernel and stride R) HWC², keys and values 2(HW/R²)C².
    """
    return reduction_cost(height, width, dim, reduction).macs


class Cost(NamedTuple):
    """Multiply-adds, attention weights and peak bytes of an attention; see the head of this module."""

    macs: int
    weights: int
    memory: int


@_checked()
def mhsa_cost(height: int, width: int, dim: int, heads: int = 1) -> Cost:
    """Cost of MHSA: (HW)² weights per head; alive at the peak are queries, keys and values, 3HWC."""
    values, weights = height * width * dim, heads * (height * width) ** 2
    macs = 3 * values * dim + 2 * (height * width) ** 2 * dim
    return Cost(macs, weights, 4 * 3 * values + _product_bytes(weights, values))


@_checked()
def h_mhsa_cost(height: int, width: int, dim: int, grid_size: int, pool_size: int, heads: int = 1) -> Cost:
    """Cost of H-MHSA at any size; weights and bytes are those of the larger of its two steps.

    Local: H'W'·G1² weights per head; queries, keys and values, 3H'W'C, and their grids, a copy; with padding its mask,
    too, as a byte and as a float per position. Global: HW·⌈H/G2⌉⌈W/G2⌉ weights per head; the result of the local step,
    A1 and the queries, 3HWC together; the pooled map, its keys and values, 3⌈H/G2⌉⌈W/G2⌉C.
    """
    positions, pooled = height * width, ceil(height / pool_size) * ceil(width / pool_size)
    rows, columns = min(height, grid_size), min(width, grid_size)
    padded = ceil(height / rows) * rows * ceil(width / columns) * columns
    local, across = padded * rows * columns, positions * pooled
    mask = 5 * padded if padded > positions else 0
    local_memory = 4 * 6 * padded * dim + mask + _product_bytes(heads * local, padded * dim)
    global_memory = 4 * 3 * (positions + pooled) * dim + _product_bytes(heads * across, positions * dim)
    macs = 4 * positions * dim**2 + 2 * local * dim + 2 * pooled * dim * (dim + positions)
    return Cost(macs, heads * max(local, across), max(local_memory, global_memory))


@_checked("window_size")
def window_cost(height: int, width: int, dim: int, window_size: int, heads: int = 1) -> Cost:
    """Cost of window attention: HW·M² weights per head.

    Alive are queries, keys and values, the same rolled, and their windows, a copy, 9HWC together; and the mask with
    the bias, two floats per weight and a byte that all heads share. Small tensors are omitted.
    """
    values, weights = height * width * dim, heads * height * width * window_size**2
    macs = 3 * values * dim + 2 * window_size**2 * values
    return Cost(macs, weights, 4 * 9 * values + 8 * weights + weights // heads + _product_bytes(weights, values))


@_checked("reduction")
def reduction_cost(height: int, width: int, dim: int, reduction: int, heads: int = 1) -> Cost:
    """Cost of PVT's spatial reduction attention: (HW)²/R² weights per head.

    Alive are the normalised input and the queries, 2HWC; keys and values, 2HWC/R². On small maps a CPU copies more of
    the convolution's weights, up to 4R²C², which is omitted.
    """
    positions, pooled = height * width, height * width // reduction**2
    weights = heads * positions * pooled
    macs = 2 * positions * dim**2 + 2 * pooled * dim * (dim + positions)
    return Cost(macs, weights, 4 * 2 * (positions + pooled) * dim + _product_bytes(weights, positions * dim))


def _product_bytes(weights: int, values: int) -> int:
    """Return the peak bytes of plain products beyond queries, keys and values; ``values`` is the size of the queries.

    The queries scaled; and the weights before and after the softmax with a byte each for PyTorch's test for −∞, or,
    where that is more, the weights and the result.
    """
    return 4 * values + max((4 + 4 + 1) * weights, 4 * weights + 4 * values)


@dataclass(kw_only=True)
class StageRow(Row):
    """Complexity of the attention in one block of a stage; ``h_mhsa_macs`` is Eq. 15 unchanged, perhaps a fraction.

    In stage 5, which is plain, all formulas are Eq. 5.
    """

    stage: int
    height: int
    width: int
    dim: int = column("C")
    grid_size: int | None = column("G1", default=None)
    pool_size: int | None = column("G2", default=None)
    mhsa_macs: int = column("Eq. 5, MHSA (M)", 1e6, 2)
    h_mhsa_macs: float = column("Eq. 15, H-MHSA (M)", 1e6, 2)
    h_mhsa_macs_padded: int = column("padded (M)", 1e6, 2)
    h_mhsa_bound: float = column("bound (M)", 1e6, 2)
    divides: bool
    measured_macs: int = column("measured (M)", 1e6, 2)


def attention_macs(module: nn.Module, height: int, width: int) -> int:
    """Count the multiply-adds of Eq. 5 and Eq. 15 on a built attention that runs on an H×W map.

    Every convolution but W^p, which is ``module.proj``, and the products of the attention.
    """
    weight: Tensor = module.get_submodule("proj").weight  # type: ignore[assignment]  # of any Module
    analysis = trace(module, torch.zeros(1, weight.shape[1], height, width, device=weight.device, dtype=weight.dtype))
    operators = analysis.by_operator()
    return int(operators["conv"] + operators["attention"] - analysis.total("proj"))


def stage_complexity(model: HATNet, height: int, width: int) -> list[StageRow]:
    """Compare Eq. 5 and Eq. 15 with the measured products of the attention of one block per stage.

    Args:
        model: on any device but meta.
        height: H of the image in pixels, at least 32.
        width: W of the image in pixels, at least 32.
    """
    maps: list[tuple[int, int]] = []
    attentions = [stage.blocks[0].attn for stage in model.stages]  # type: ignore[union-attr,index]  # ModuleList: of Module
    handles = [
        attention.register_forward_pre_hook(lambda _, inputs: maps.append(tuple(inputs[0].shape[-2:])))
        for attention in attentions
    ]
    try:
        with torch.no_grad():
            model.eval()(example_image(model, height, width))
    finally:
        for handle in handles:
            handle.remove()
    return [_stage_row(i, attention, *maps[i - 2]) for i, attention in enumerate(attentions, 2)]


def _stage_row(stage: int, attention: nn.Module, height: int, width: int) -> StageRow:
    if not isinstance(attention, HierarchicalAttention | Attention):
        raise ValueError(f"attention of stage {stage} must be H-MHSA or MHSA, which Eq. 15 covers, got windows")
    dim = attention.qkv.in_channels
    plain = mhsa_macs(height, width, dim)
    row = StageRow(
        stage=stage,
        height=height,
        width=width,
        dim=dim,
        divides=True,
        measured_macs=attention_macs(attention, height, width),
        **dict.fromkeys(("mhsa_macs", "h_mhsa_macs", "h_mhsa_macs_padded", "h_mhsa_bound"), plain),
    )
    if isinstance(attention, HierarchicalAttention):
        row.grid_size, row.pool_size = sizes = attention.grid_size, attention.pool_size
        eq15 = _eq15(height, width, dim, *sizes)
        row.h_mhsa_macs = int(eq15) if eq15.denominator == 1 else float(eq15)
        row.h_mhsa_macs_padded = h_mhsa_macs_padded(height, width, dim, *sizes)
        row.h_mhsa_bound = h_mhsa_bound(height, width, dim, *sizes)
        row.divides = not any(side % size for side in (height, width) for size in sizes)
    return row
