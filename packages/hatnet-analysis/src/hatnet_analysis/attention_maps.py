"""Attention weights of the local and the global step of H-MHSA, from one point of an image or from all of them.

The fused attention of the model keeps no weights, so each layer computes them again from its input
(``attention_weights`` of ``hatnet_core.attention``). :func:`rollout` multiplies them over all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hatnet_core import HATNet
from hatnet_core.attention import (
    Attention,
    HierarchicalAttention,
    crop,
    grid_partition,
    grid_reverse,
    pad_to_multiple,
)

FIRST_STRIDE = 4
"""Pixels of the model's input along a side of a position of stage 2; twice as many with every further stage."""

MAX_BYTES = 2**32
"""Most that the weights of all blocks may take; they grow with the square of the number of pixels."""


@dataclass(frozen=True)
class AttentionWeights:
    """Attention weights of one layer on one image; every row sums to 1.

    Attributes:
        height: H of the map.
        width: W of the map.
        grid: height and width of a local grid; None for the plain attention of stage 5.
        pool_size: G2; 1 for plain attention.
        local: [heads, rows, columns, g·g', g·g'] from each position of a grid to each of the same grid, 0 to padding;
            None for plain attention.
        global_: [heads, H·W, H'·W'] from each position to each pooled one.
        stride: pixels of the model's input along a side of a position; the last ones may reach beyond the input.
        input_size: height and width of the model's input in pixels.
    """

    height: int
    width: int
    grid: tuple[int, int] | None
    pool_size: int
    local: Tensor | None
    global_: Tensor
    stride: int
    input_size: tuple[int, int]


@dataclass(frozen=True)
class PointAttention:
    """Attention of one position in one head.

    Attributes:
        row: of the position on the map.
        column: of the position on the map.
        local: [h, w] weights within its grid, of the positions that exist; None for plain attention.
        top: first row of the grid on the map.
        left: first column.
        global_: [H', W'] weights of the pooled map.
        pool_size: G2, positions of the map along a side of a pooled one.
        height: H of the map.
        width: W of the map.
        stride: pixels of the model's input along a side of a position.
    """

    row: int
    column: int
    local: Tensor | None
    top: int
    left: int
    global_: Tensor
    pool_size: int
    height: int
    width: int
    stride: int


def attention_weights(
    module: nn.Module, x: Tensor, stride: int = 1, input_size: tuple[int, int] | None = None
) -> AttentionWeights:
    """Weights of one attention layer.

    Args:
        module: :class:`HierarchicalAttention` or :class:`Attention` of hatnet-core.
        x: [1, C, H, W], the input of the layer.
        stride: pixels of the model's input along a side of a position.
        input_size: height and width of the model's input in pixels; that of ``x`` for a layer alone.

    Raises:
        ValueError: if the layer is of another kind.
    """
    if not isinstance(module, HierarchicalAttention | Attention):
        raise ValueError(f"module must be H-MHSA or plain MHSA, got {type(module).__name__}")
    height, width = x.shape[-2:]
    place = (stride, input_size or (height, width))
    if isinstance(module, Attention):
        return AttentionWeights(height, width, None, 1, None, module.attention_weights(x)[0], *place)
    weights = module.attention_weights(x)
    grid = (min(height, module.grid_size), min(width, module.grid_size))
    return AttentionWeights(height, width, grid, module.pool_size, weights.local[0], weights.global_[0], *place)


@dataclass(frozen=True)
class View:
    """Everything that is drawn of one point.

    Attributes:
        point: x and y in pixels of the image.
        stage: of the paper, 2-5.
        block: of the stage, from 0.
        head: from 0; None for the mean.
        attention: where the point's position looks.
        input_size: height and width in pixels that the image is scaled to for the model.
        rollout: [H/4, W/4] shares, from the point's position on the last map.
        mean_rollout: [H/4, W/4] shares, the mean over all positions.
    """

    point: tuple[float, float]
    stage: int
    block: int
    head: int | None
    attention: PointAttention
    input_size: tuple[int, int]
    rollout: Tensor
    mean_rollout: Tensor

    def record(self) -> dict[str, Any]:
        """Everything, for JSON."""
        at = self.attention
        return {
            "point": list(self.point),
            "stage": self.stage,
            "block": self.block,
            "head": self.head,
            "row": at.row,
            "column": at.column,
            "height": at.height,
            "width": at.width,
            "top": at.top,
            "left": at.left,
            "pool_size": at.pool_size,
            "stride": at.stride,
            "input_size": list(self.input_size),
            "local": None if at.local is None else at.local.tolist(),
            "global": at.global_.tolist(),
            "rollout": self.rollout.tolist(),
        }

    def strongest(self, number: int = 5) -> list[dict[str, Any]]:
        """Return the largest weights of each step, with their ``row`` and ``column`` on the map of the stage.

        A pooled position is named by the first of those that it is pooled from, in the upper left.
        """
        at, rows = self.attention, []
        steps = (
            ("local", at.local, at.top, at.left, 1),
            ("global" if at.pool_size == 1 else "global (pooled)", at.global_, 0, 0, at.pool_size),
        )
        for step, weights, top, left, side in steps:
            if weights is None:
                continue
            largest = weights.flatten().topk(min(number, weights.numel()))
            for value, index in zip(largest.values.tolist(), largest.indices.tolist(), strict=True):
                row, column = divmod(index, weights.shape[1])
                rows.append({"step": step, "row": top + row * side, "column": left + column * side, "weight": value})
        return rows


def look(
    recorded: Sequence[Sequence[AttentionWeights]],
    image: Image.Image,
    point: tuple[float, float],
    stage: int,
    block: int | None = None,
    head: int | None = None,
) -> View:
    """Attention of a point of the image in one block, and rollout from it.

    Args:
        recorded: of :func:`record_weights`.
        image: the image that ``point`` is in.
        point: x and y in pixels.
        stage: of the paper, 2-5.
        block: of the stage, from 0; None for the last.
        head: from 0; None for the mean of all.

    Raises:
        ValueError: if the point is outside the image, or stage, block or head do not exist.
    """
    if not 2 <= stage <= len(recorded) + 1:
        raise ValueError(f"stage must be from 2 to {len(recorded) + 1}, got {stage}")
    blocks = recorded[stage - 2]
    number = len(blocks) - 1 if block is None else block
    if not 0 <= number < len(blocks):
        raise ValueError(f"block of stage {stage} must be from 0 to {len(blocks) - 1}, got {block}")
    weights = blocks[number]
    attention = point_attention(weights, *to_position(point, image, weights), head)
    last = to_position(point, image, recorded[-1][-1])
    from_point, mean = rollout(recorded, last), rollout(recorded)
    return View(point, stage, number, head, attention, weights.input_size, from_point, mean)


def record_weights(model: HATNet, image: Tensor) -> list[list[AttentionWeights]]:
    """Weights of every block of every stage.

    Args:
        model: HAT-Net; run in evaluation mode.
        image: [1, in_chans, H, W], normalised.

    Returns:
        For each of the paper's stages 2-5 the weights of its blocks.

    Raises:
        ValueError: if a stage attends in windows.
    """
    recorded: list[list[AttentionWeights]] = [[] for _ in model.stages]
    input_size = (image.shape[-2], image.shape[-1])
    handles = []
    for i, stage in enumerate(model.stages):
        for block in stage.blocks:  # type: ignore[union-attr]  # ModuleList: of Module

            def hook(module: nn.Module, inputs: tuple[Tensor], i: int = i) -> None:
                recorded[i].append(attention_weights(module, inputs[0], FIRST_STRIDE * 2**i, input_size))

            handles.append(block.attn.register_forward_pre_hook(hook))
    try:
        with torch.inference_mode():
            model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def point_attention(weights: AttentionWeights, row: int, column: int, head: int | None = None) -> PointAttention:
    """Cut out what one position looks at.

    Args:
        weights: of one layer.
        row: of the position on the map, in [0, H).
        column: of the position on the map, in [0, W).
        head: in [0, heads); None for the mean of all.

    Raises:
        ValueError: if the position or the head does not exist.
    """
    heads = weights.global_.shape[0]
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"head must be from 0 to {heads - 1}, got {head}")
    if not (0 <= row < weights.height and 0 <= column < weights.width):
        raise ValueError(f"position must be on the map of {weights.height}×{weights.width}, got {row}, {column}")
    chosen = slice(None) if head is None else slice(head, head + 1)
    pooled = (-(-weights.height // weights.pool_size), -(-weights.width // weights.pool_size))
    global_ = weights.global_[chosen, row * weights.width + column].mean(0).reshape(pooled)
    local, top, left = None, 0, 0
    if weights.local is not None and weights.grid is not None:
        g, g2 = weights.grid
        top, left = row // g * g, column // g2 * g2
        position = (row - top) * g2 + column - left
        local = weights.local[chosen, row // g, column // g2, position].mean(0).reshape(g, g2)
        local = local[: weights.height - top, : weights.width - left]
    size = (weights.height, weights.width)
    return PointAttention(row, column, local, top, left, global_, weights.pool_size, *size, weights.stride)


def rollout(recorded: Sequence[Sequence[AttentionWeights]], point: tuple[int, int] | None = None) -> Tensor:
    """Attention rollout (Abnar and Zuidema, ACL 2020) over all blocks, from the last map back to the first.

    A block passes half of its input on by each of its residuals: A1 is (I + L)/2 of X, with L the local weights;
    A1 + A2 is (I + G·P)/2 of that, with G the global weights and P the pooling; the block is (I + …)/2. Heads are
    averaged, the MLP counts as identity, and a downsampling spreads a position evenly over its 2×2 positions.

    Args:
        recorded: of :func:`record_weights`.
        point: row and column on the last map; without it the mean over all of its positions, which is what the
            classifier sees.

    Returns:
        [H/4, W/4] shares of the positions of the first map; they sum to 1.
    """
    last = recorded[-1][-1]
    share = torch.zeros(last.height, last.width)
    if point is None:
        share += 1 / share.numel()
    else:
        share[point] = 1
    for i, stage in reversed(list(enumerate(recorded))):
        for weights in reversed(stage):
            share = (share + _through_attention(share, weights)) / 2
        if i:
            below = recorded[i - 1][-1]
            share = _through_downsampling(share, (below.height, below.width))
    return share


def _through_attention(share: Tensor, weights: AttentionWeights) -> Tensor:
    """[H, W] shares of the output → those of the input of one attention."""
    pooled = share.flatten() @ weights.global_.mean(0)
    if weights.local is None or weights.grid is None:
        return pooled.reshape(share.shape)
    size = weights.pool_size
    pooled = pooled.reshape(-(-weights.height // size), -(-weights.width // size))
    counts = F.avg_pool2d(torch.ones(1, 1, *share.shape), size, ceil_mode=True, divisor_override=1)[0, 0]
    spread = (pooled / counts).repeat_interleave(size, 0).repeat_interleave(size, 1)
    share = (share + spread[: weights.height, : weights.width]) / 2
    grids = grid_partition(pad_to_multiple(share[None, None], weights.grid), weights.grid)  # [rows·columns, n, 1]
    mixed = torch.einsum("gn,gnm->gm", grids[..., 0], weights.local.mean(0).flatten(0, 1))
    mixed = grid_reverse(mixed[:, None, :, None], 1, weights.height, weights.width, weights.grid)
    return (share + crop(mixed, weights.height, weights.width)[0, 0]) / 2


def _through_downsampling(share: Tensor, size: tuple[int, int]) -> Tensor:
    """Shares of the map after a downsampling → of the map preceding it, each spread over its 2×2 positions."""
    counts = F.avg_pool2d(torch.ones(1, 1, *size), 2, ceil_mode=True, divisor_override=1)[0, 0]
    spread = (share / counts).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return spread[: size[0], : size[1]]


def check_size(model: HATNet, size: tuple[int, int]) -> None:
    """ValueError if the weights of every block on an image of ``size`` (height, width) exceed ``MAX_BYTES``."""
    stages: Any = model.stages
    maps = [[-(-side // (FIRST_STRIDE * 2**i)) for side in size] for i in range(len(stages))]
    need = 4 * sum(
        _numbers(block.attn, *map_) for stage, map_ in zip(stages, maps, strict=True) for block in stage.blocks
    )
    if need > MAX_BYTES:
        raise ValueError(f"attention weights of {need / 2**30:,.0f} GiB; expected at most {MAX_BYTES / 2**30:g} GiB")


def _numbers(module: Attention | HierarchicalAttention, height: int, width: int) -> int:
    """Count the weights that :func:`attention_weights` returns of one layer on an H×W map."""
    if isinstance(module, Attention):
        return module.num_heads * (height * width) ** 2
    g, g2 = min(height, module.grid_size), min(width, module.grid_size)
    local = -(-height // g) * -(-width // g2) * (g * g2) ** 2
    pooled = -(-height // module.pool_size) * -(-width // module.pool_size)
    return module.num_heads * (local + height * width * pooled)


def to_position(point: tuple[float, float], image: Image.Image, weights: AttentionWeights) -> tuple[int, int]:
    """Row and column on a map of the point (x, y) in pixels of the image, which is scaled to the model's input.

    Position i of a map stands for the pixels from i·stride to (i + 1)·stride of that input.

    Raises:
        ValueError: if the point is outside the image.
    """
    x, y = point
    if not (0 <= x < image.width and 0 <= y < image.height):
        raise ValueError(f"point must be inside the image of {image.width}×{image.height}, got x={x:g}, y={y:g}")
    height, width = weights.input_size
    row, column = y * height / image.height // weights.stride, x * width / image.width // weights.stride
    return int(row), int(column)
