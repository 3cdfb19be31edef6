"""Complexity of attention in closed form: Eq. 5 and 15, their relatives, and the same products measured.

Eq. 5 and 15 leave out the output projection W^p (HWC²), normalisation, softmax and pooling, and count one multiply-add
as one; the forms for windows and spatial reduction here do the same, so that all four compare. Space is the number of
attention weights and pooled values that the same products need at once.

``growth.py`` measures time and memory beside these; ``flops.py`` counts built models.
"""

from __future__ import annotations

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
    positions = positive_int("height", height) * positive_int("width", width)
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
    positions = positive_int("height", height) * positive_int("width", width)
    positive_int("dim", dim)
    _dividing(height, width, grid_size=grid_size, pool_size=pool_size)
    pooled = positions // pool_size**2
    return positions * dim * (4 * dim + 2 * grid_size**2) + 2 * pooled * dim * (dim + positions)


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
    positions = positive_int("height", height) * positive_int("width", width)
    positive_int("dim", dim)
    rows, columns = (min(side, positive_int("grid_size", grid_size)) for side in (height, width))
    completed = _up(height, rows) * _up(width, columns)
    pooled = ceil(height / positive_int("pool_size", pool_size)) * ceil(width / pool_size)
    local = 4 * positions * dim**2 + 2 * completed * rows * columns * dim
    return local + 2 * pooled * dim * (dim + positions)


def h_mhsa_bound(height: int, width: int, dim: int, grid_size: int, pool_size: int) -> float:
    """What :func:`h_mhsa_macs_completed` never exceeds: Eq. 15 of H×W times (1 + (G−1)/H)(1 + (G−1)/W), G the larger.

    Eq. 15 is taken as it stands, whole grids or not. A side is completed by less than one grid or pool.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        grid_size: G1.
        pool_size: G2.
    """
    positions = height * width
    eq15 = positions * dim * (4 * dim + 2 * grid_size**2) + 2 * positions / pool_size**2 * dim * (dim + positions)
    longest = max(grid_size, pool_size) - 1
    return eq15 * (1 + longest / height) * (1 + longest / width)


def window_macs(height: int, width: int, dim: int, window_size: int) -> int:
    """Multiply-adds of window attention, as Swin states it but without W^p: 3HWC² + 2M²HWC, M dividing H and W.

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        window_size: M, side of a window in positions.
    """
    positions = _dividing(height, width, window_size=window_size)
    return 3 * positions * dim**2 + 2 * window_size**2 * positions * dim


def reduction_macs(height: int, width: int, dim: int, reduction: int) -> int:
    """Multiply-adds of PVT's spatial reduction attention without W^p: 2HWC² + 2(HW/R²)C(C + HW), R dividing H and W.

    Queries take HWC², the convolution that reduces (kernel and stride R) HWC², keys and values 2(HW/R²)C².

    Args:
        height: H, in positions of the feature map.
        width: W, likewise.
        dim: C, number of channels.
        reduction: R, kernel and stride of the convolution.
    """
    positions = _dividing(height, width, reduction=reduction)
    return 2 * positions * dim**2 + 2 * (positions // reduction**2) * dim * (dim + positions)


def mhsa_weights(height: int, width: int, heads: int) -> int:
    """Attention weights of MHSA: (HW)² a head."""
    return heads * (height * width) ** 2


def h_mhsa_weights(height: int, width: int, heads: int, grid_size: int, pool_size: int) -> int:
    """Most attention weights that H-MHSA holds at once, a head: HW·G1² in its grids or (HW)²/G2² of the pooled map."""
    positions = height * width
    return heads * max(positions * grid_size**2, positions * (positions // pool_size**2))


def window_weights(height: int, width: int, heads: int, window_size: int) -> int:
    """Attention weights of window attention: HW·M² a head."""
    return heads * height * width * window_size**2


def reduction_weights(height: int, width: int, heads: int, reduction: int) -> int:
    """Attention weights of spatial reduction attention: (HW)²/R² a head."""
    positions = height * width
    return heads * positions * (positions // reduction**2)


def attention_macs(module: nn.Module, height: int, width: int) -> int:
    """Multiply-adds that Eq. 5 and Eq. 15 speak of, counted on a built attention that runs on an H×W map.

    Every convolution but W^p, which is ``module.proj``, and the products of the attention.
    """
    weight: Tensor = module.get_submodule("proj").weight  # type: ignore[assignment]
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
        ``pool_size``, ``mhsa_macs`` (Eq. 5), ``h_mhsa_macs`` (Eq. 15; completed where G1 or G2 does not divide; of
        stage 5, which is plain, Eq. 5), ``measured_macs`` and ``divides``.
    """
    maps: list[tuple[int, int]] = []
    handles = [
        stage.blocks[0].attn.register_forward_pre_hook(lambda _, inputs: maps.append(tuple(inputs[0].shape[-2:])))  # type: ignore[union-attr,index]
        for stage in model.stages
    ]
    try:
        with torch.no_grad():
            model.eval()(example_image(model, height, width))
    finally:
        for handle in handles:
            handle.remove()
    return [_stage_row(i, stage.blocks[0].attn, *maps[i]) for i, stage in enumerate(model.stages)]  # type: ignore[union-attr,index]


def _stage_row(i: int, attention: nn.Module, height: int, width: int) -> dict[str, Any]:
    if not isinstance(attention, HierarchicalAttention | Attention):
        raise ValueError(f"stage {i + 2} attends in windows, which Eq. 15 does not speak of; expected H-MHSA or MHSA")
    dim = attention.qkv.in_channels
    row = {"stage": i + 2, "height": height, "width": width, "dim": dim, "grid_size": None, "pool_size": None}
    row["mhsa_macs"] = row["h_mhsa_macs"] = mhsa_macs(height, width, dim)
    row["divides"] = True
    if isinstance(attention, HierarchicalAttention):
        sizes = row["grid_size"], row["pool_size"] = attention.grid_size, attention.pool_size
        row["h_mhsa_macs"] = h_mhsa_macs_completed(height, width, dim, *sizes)
        row["divides"] = not any(side % size for side in (height, width) for size in sizes)
    return row | {"measured_macs": attention_macs(attention, height, width)}


def _up(side: int, grid: int) -> int:
    return ceil(side / grid) * grid


def _dividing(height: int, width: int, **sizes: int) -> int:
    """H·W; ValueError unless every size divides both."""
    positions = positive_int("height", height) * positive_int("width", width)
    for name, size in sizes.items():
        if height % positive_int(name, size) or width % size:
            raise ValueError(f"{name} must divide height and width, got {name}={size} and {height}×{width}")
    return positions
