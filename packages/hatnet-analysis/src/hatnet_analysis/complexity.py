"""Complexity of attention in closed form: Eq. 5 and 15, their relatives, and the same products measured.

Eq. 5 and 15 leave out the output projection W^p (HWC²), normalisation, softmax and pooling, and count one multiply-add
as one; the forms for windows and spatial reduction here do the same, so that all four compare.

Space has two measures. ``*_weights`` is the number of attention weights held at once, the term that Sec. 3 calls
O(H²W²). ``*_bytes`` is all that PyTorch holds at the peak of a layer's forward pass beyond its input and parameters:
one image, float32, inference, and the attention as plain products (``torch.nn.attention.SDPBackend.MATH``) of a map in
``channels_last``, as the model lays it out inside, where positions are tokens without a copy. Each says which tensors
of ``hatnet_core.attention`` are alive then; nothing in them is fitted. A fused attention holds less.

``growth.py`` measures time and memory beside these; ``flops.py`` counts built models.
"""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from hatnet_analysis.flops import example_image, trace
from hatnet_core import HATNet
from hatnet_core.attention import Attention, HierarchicalAttention, positive_int


def mhsa_macs(height: int, width: int, dim: int) -> int:
    """Multiply-adds of plain MHSA: 3HWC² + 2(HW)²C (Eq. 5).

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.

    Raises:
        ValueError: if an argument is not a positive integer.
    """
    positions = _positions(height, width)
    positive_int("dim", dim)
    return 3 * positions * dim**2 + 2 * positions**2 * dim


def h_mhsa_macs(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> int:
    """Multiply-adds of H-MHSA: HWC(4C + 2G1²) + 2(HW/G2²)C(C + HW) (Eq. 15).

    Args:
        height: H, in positions of the feature map; divisible by both sizes.
        width: W, likewise.
        dim: C, number of channels.
        grid_size: G1, side of a local attention grid in positions.
        pool_size: G2, kernel and stride of the average pooling of keys and values.

    Raises:
        ValueError: if an argument is not a positive integer, or a size does not divide H and W: Eq. 15 counts
            whole grids and pools.
    """
    _dividing(height, width, grid_size=grid_size, pool_size=pool_size)
    return int(_eq15(height, width, dim, grid_size, pool_size))


def h_mhsa_macs_completed(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> int:
    """Multiply-adds of H-MHSA at any size, where the last grids and pools are completed at the right and bottom.

    HWC·4C + 2·H'W'·G1²·C + 2·⌈H/G2⌉⌈W/G2⌉·C(C + HW), with H' = G1·⌈H/G1⌉ and W' likewise; where a grid holds the
    whole side, that side is the grid's. Equal to Eq. 15 where G1 and G2 divide H and W; elsewhere at most
    :func:`h_mhsa_bound`.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        grid_size: G1.
        pool_size: G2.

    Raises:
        ValueError: if an argument is not a positive integer.
    """
    positions, _, pooled = _h_mhsa_positions(height, width, grid_size, pool_size)
    in_grids, _ = _h_mhsa_step_weights(height, width, 1, grid_size, pool_size)
    return 4 * positions * positive_int("dim", dim) ** 2 + 2 * in_grids * dim + 2 * pooled * dim * (dim + positions)


def h_mhsa_bound(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> float:
    """What :func:`h_mhsa_macs_completed` never exceeds: Eq. 15 of H×W times (1 + (G−1)/H)(1 + (G−1)/W), G the larger.

    Eq. 15 is taken as it stands, whole grids or not. A side is completed by less than one grid or pool.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        grid_size: G1.
        pool_size: G2.

    Raises:
        ValueError: if an argument is not a positive integer.
    """
    eq15 = _eq15(height, width, dim, grid_size, pool_size)
    longest = max(grid_size, pool_size) - 1
    return float(eq15 * (1 + Fraction(longest, height)) * (1 + Fraction(longest, width)))


def window_macs(height: int, width: int, dim: int, window_size: int) -> int:
    """Multiply-adds of window attention, as Swin states it but without W^p: 3HWC² + 2M²HWC, M dividing H and W.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        window_size: M, side of a window in positions.

    Raises:
        ValueError: if an argument is not a positive integer, or M does not divide H and W.
    """
    positions = _dividing(height, width, window_size=window_size)
    positive_int("dim", dim)
    return 3 * positions * dim**2 + 2 * window_size**2 * positions * dim


def reduction_macs(height: int, width: int, dim: int, reduction: int) -> int:
    """Multiply-adds of PVT's spatial reduction attention without W^p: 2HWC² + 2(HW/R²)C(C + HW), R dividing H and W.

    Queries take HWC², the convolution that reduces (kernel and stride R) HWC², keys and values 2(HW/R²)C².

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        reduction: R, kernel and stride of the convolution.

    Raises:
        ValueError: if an argument is not a positive integer, or R does not divide H and W.
    """
    positions = _dividing(height, width, reduction=reduction)
    positive_int("dim", dim)
    return 2 * positions * dim**2 + 2 * (positions // reduction**2) * dim * (dim + positions)


def mhsa_weights(height: int, width: int, heads: int) -> int:
    """Attention weights of MHSA: (HW)² a head.

    Raises:
        ValueError: if an argument is not a positive integer, here and in the three below.
    """
    return positive_int("heads", heads) * _positions(height, width) ** 2


def h_mhsa_weights(height: int, width: int, heads: int, grid_size: int, pool_size: int) -> int:
    """Most attention weights that H-MHSA holds at once, those of its grids or those to the pooled map.

    A head: H'W'·G1² or HW·⌈H/G2⌉⌈W/G2⌉, completed as in :func:`h_mhsa_macs_completed`.
    """
    return max(_h_mhsa_step_weights(height, width, heads, grid_size, pool_size))


def window_weights(height: int, width: int, heads: int, window_size: int) -> int:
    """Attention weights of window attention: HW·M² a head, M dividing H and W."""
    return positive_int("heads", heads) * _dividing(height, width, window_size=window_size) * window_size**2


def reduction_weights(height: int, width: int, heads: int, reduction: int) -> int:
    """Attention weights of spatial reduction attention: (HW)²/R² a head, R dividing H and W."""
    return positive_int("heads", heads) * _dividing(height, width, reduction=reduction) ** 2 // reduction**2


def mhsa_bytes(height: int, width: int, dim: int, heads: int) -> int:
    """Peak bytes of MHSA: 4·3HWC and the plain products of (HW)² weights a head.

    Alive at the peak: the map of queries, keys and values, whose positions are the tokens.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        heads: number of heads.

    Raises:
        ValueError: if an argument is not a positive integer.
    """
    values = _positions(height, width) * positive_int("dim", dim)
    return 4 * 3 * values + _product_bytes(mhsa_weights(height, width, heads), values)


def h_mhsa_bytes(height: int, width: int, dim: int, heads: int, grid_size: int, pool_size: int) -> int:
    """Peak bytes of H-MHSA at any size, those of the dearer of its two steps.

    Local: the map of queries, keys and values, 3H'W'C, and its grids, a copy; where the grids are completed, their
    mask too, as a byte and as a float a position. Global: the result of the local step, A1 and the map of queries,
    3HWC together; the pooled map and the map of keys and values, 3⌈H/G2⌉⌈W/G2⌉C. Each with its plain products;
    completed as in :func:`h_mhsa_macs_completed`.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        heads: number of heads.
        grid_size: G1.
        pool_size: G2.

    Raises:
        ValueError: if an argument is not a positive integer.
    """
    in_grids, in_pools = _h_mhsa_step_weights(height, width, heads, grid_size, pool_size)
    positions, completed, pooled = _h_mhsa_positions(height, width, grid_size, pool_size)
    positive_int("dim", dim)
    mask = 5 * completed if completed > positions else 0
    local = 4 * 6 * completed * dim + mask + _product_bytes(in_grids, completed * dim)
    return max(local, 4 * (3 * positions + 3 * pooled) * dim + _product_bytes(in_pools, positions * dim))


def window_bytes(height: int, width: int, dim: int, heads: int, window_size: int) -> int:
    """Peak bytes of window attention: 4·9HWC, its mask, and the plain products of HW·M² weights a head.

    Alive at the peak: the map of queries, keys and values, the same rolled, and its windows, a copy, 9HWC together;
    for each weight the mask with the bias, twice as a float, and a byte for all heads that tells who sees whom. The
    table of the bias, and what else is smaller than a map by an order, is left out.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        heads: number of heads.
        window_size: M, dividing H and W.

    Raises:
        ValueError: if an argument is not a positive integer, or M does not divide H and W.
    """
    weights = window_weights(height, width, heads, window_size)
    values = _positions(height, width) * positive_int("dim", dim)
    return 4 * 9 * values + 8 * weights + weights // heads + _product_bytes(weights, values)


def reduction_bytes(height: int, width: int, dim: int, heads: int, reduction: int) -> int:
    """Peak bytes of PVT's spatial reduction attention: 4(2HWC + 2HWC/R²) and the plain products of (HW)²/R² weights.

    Alive at the peak: the normalised input and the map of queries; the map of keys and values. On small maps what a
    CPU copies of the convolution's weights, up to 4R²C², is more; it is left out.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        heads: number of heads.
        reduction: R, dividing H and W.

    Raises:
        ValueError: if an argument is not a positive integer, or R does not divide H and W.
    """
    weights = reduction_weights(height, width, heads, reduction)
    values = _positions(height, width) * positive_int("dim", dim)
    return 4 * (2 * values + 2 * values // reduction**2) + _product_bytes(weights, values)


def attention_macs(module: nn.Module, height: int, width: int) -> int:
    """Multiply-adds that Eq. 5 and Eq. 15 speak of, counted on a built attention that runs on an H×W map.

    Every convolution but W^p, which is ``module.proj``, and the products of the attention.
    """
    weight: Tensor = module.get_submodule("proj").weight  # type: ignore[assignment]  # of any Module
    x = torch.zeros(1, weight.shape[1], height, width, device=weight.device, dtype=weight.dtype)
    analysis = trace(module, x)
    operators = analysis.by_operator()
    return int(operators["conv"] + operators["attention"] - analysis.total("proj"))


def stage_complexity(model: HATNet, height: int, width: int) -> list[dict[str, Any]]:
    """Eq. 5, Eq. 15 and the measured products of the attention of one block a stage.

    Args:
        model: on any device but meta.
        height: H of the image in pixels, at least 32.
        width: W, likewise.

    Returns:
        For each of the paper's stages 2-5: ``stage``, ``height``, ``width`` and ``dim`` of its map, ``grid_size``,
        ``pool_size``, ``mhsa_macs`` (Eq. 5), ``h_mhsa_macs`` (Eq. 15 as it stands, a fraction where it is one),
        ``h_mhsa_macs_completed``, ``h_mhsa_bound``, ``divides`` and ``measured_macs``. Of stage 5, which is plain, all
        of them are Eq. 5.
    """
    maps: list[tuple[int, int]] = []
    handles = [
        stage.blocks[0].attn.register_forward_pre_hook(lambda _, inputs: maps.append(tuple(inputs[0].shape[-2:])))  # type: ignore[union-attr,index]  # ModuleList: of Module
        for stage in model.stages
    ]
    try:
        with torch.no_grad():
            model.eval()(example_image(model, height, width))
    finally:
        for handle in handles:
            handle.remove()
    return [_stage_row(i, stage.blocks[0].attn, *maps[i]) for i, stage in enumerate(model.stages)]  # type: ignore[union-attr,index]  # ModuleList: of Module


def _stage_row(i: int, attention: nn.Module, height: int, width: int) -> dict[str, Any]:
    if not isinstance(attention, HierarchicalAttention | Attention):
        raise ValueError(f"stage {i + 2} attends in windows, which Eq. 15 does not speak of; expected H-MHSA or MHSA")
    dim = attention.qkv.in_channels
    row: dict[str, Any] = {
        "stage": i + 2,
        "height": height,
        "width": width,
        "dim": dim,
        "grid_size": None,
        "pool_size": None,
    }
    plain = mhsa_macs(height, width, dim)
    row |= dict.fromkeys(("mhsa_macs", "h_mhsa_macs", "h_mhsa_macs_completed", "h_mhsa_bound"), plain)
    row["divides"] = True
    if isinstance(attention, HierarchicalAttention):
        row["grid_size"], row["pool_size"] = sizes = attention.grid_size, attention.pool_size
        eq15 = _eq15(height, width, dim, *sizes)
        row["h_mhsa_macs"] = int(eq15) if eq15.denominator == 1 else float(eq15)
        row["h_mhsa_macs_completed"] = h_mhsa_macs_completed(height, width, dim, *sizes)
        row["h_mhsa_bound"] = h_mhsa_bound(height, width, dim, *sizes)
        row["divides"] = not any(side % size for side in (height, width) for size in sizes)
    return row | {"measured_macs": attention_macs(attention, height, width)}


def _positions(height: int, width: int) -> int:
    return positive_int("height", height) * positive_int("width", width)


def _dividing(height: int, width: int, **sizes: int) -> int:
    """H·W; ValueError unless every size divides both."""
    positions = _positions(height, width)
    for name, size in sizes.items():
        if height % positive_int(name, size) or width % size:
            raise ValueError(f"{name} must divide height and width, got {name}={size} and {height}×{width}")
    return positions


def _eq15(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> Fraction:
    """Eq. 15 as it stands, at any size."""
    positions, g1 = _positions(height, width), positive_int("grid_size", grid_size)
    pooled = Fraction(positions, positive_int("pool_size", pool_size) ** 2)
    return positions * positive_int("dim", dim) * (4 * dim + 2 * g1**2) + 2 * pooled * dim * (dim + positions)


def _h_mhsa_positions(height: int, width: int, grid_size: int, pool_size: int) -> tuple[int, int, int]:
    """HW, H'W' of the completed grids and ⌈H/G2⌉⌈W/G2⌉; a grid that holds a whole side is no longer than it."""
    positions = _positions(height, width)
    rows, columns = _grid(height, width, grid_size)
    pooled = ceil(height / positive_int("pool_size", pool_size)) * ceil(width / pool_size)
    return positions, ceil(height / rows) * rows * ceil(width / columns) * columns, pooled


def _h_mhsa_step_weights(height: int, width: int, heads: int, grid_size: int, pool_size: int) -> tuple[int, int]:
    """Attention weights of the local and of the global step."""
    positions, completed, pooled = _h_mhsa_positions(height, width, grid_size, pool_size)
    rows, columns = _grid(height, width, grid_size)
    positive_int("heads", heads)
    return heads * completed * rows * columns, heads * positions * pooled


def _grid(height: int, width: int, grid_size: int) -> tuple[int, int]:
    positive_int("grid_size", grid_size)
    return min(height, grid_size), min(width, grid_size)


def _product_bytes(weights: int, values: int) -> int:
    """Peak bytes of attention as plain products, beyond queries, keys and values; ``values`` are those of the queries.

    The queries scaled; and the weights before and after the softmax, with a byte of each that tells whether it is
    −∞ (PyTorch's softmax of masked rows asks), or, where that is more, the weights and the result.
    """
    return 4 * values + max((4 + 4 + 1) * weights, 4 * weights + 4 * values)
