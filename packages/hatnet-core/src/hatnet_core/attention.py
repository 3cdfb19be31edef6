"""Hierarchical multi-head self-attention (H-MHSA, Sec. 3.2, Eq. 6-14), plain MHSA and shifted windows.

Read :class:`HierarchicalAttention` first: its ``forward`` is Eq. 6-14 in order. :class:`Attention` is the plain MHSA
of the last stage, :class:`WindowAttention` the one that Table 5 compares with. Each calls a function on projected
queries, keys and values, which partitions the map, pads, masks, attends, reverses and crops. Inputs and outputs are
[B, C, H, W].

The functions are whole nodes to ``torch.fx``. They compile and export to one graph for all sizes: for a symbolic
size they always pad and mask, which is right at any size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hatnet_core import kernels
from hatnet_core.config import positive_int as positive_int  # for hatnet-analysis, too
from hatnet_core.kernels import reference
from hatnet_core.layers import GroupNorm, lay_out
from hatnet_core.stock import Conv2d, Dropout2d


class AttentionWeights(NamedTuple):
    """Attention weights of :class:`HierarchicalAttention` on one input; each row sums to 1."""

    local: Tensor
    """[B, heads, rows, columns, n, n], within each of the rows × columns grids of n positions; 0 to padding."""

    global_: Tensor
    """[B, heads, H·W, m], from each position to each of the m pooled ones."""


class HierarchicalAttention(nn.Module):
    """H-MHSA (Eq. 6-14): attention inside small grids, then of every position to the pooled map.

    The residual ``+ X`` of Eq. 14 is outside, in the block, where stochastic depth acts on it. G1 and G2 carry
    no parameters: ``grid_size`` and ``pool_size`` may be set on a built module (on a model, by ``set_grid``).

    Args:
        dim: C, number of input and output channels.
        head_dim: channels of one head; divides ``dim``.
        grid_size: G1, side of a local attention grid in positions.
        pool_size: G2, kernel and stride of the average pooling of keys and values.
        proj_drop_rate: rate of the channel dropout after ``proj``.

    Raises:
        ValueError: if ``head_dim`` does not divide ``dim``, or a size is not positive.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 64,
        grid_size: int = 8,
        pool_size: int = 8,
        proj_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = _num_heads(dim, head_dim)
        self.grid_size = positive_int("grid_size", grid_size)
        self.pool_size = positive_int("pool_size", pool_size)
        self.norm = GroupNorm(dim)
        self.qkv = Conv2d(dim, 3 * dim, 1)
        self.grid_norm = GroupNorm(dim)
        self.pool_norm = GroupNorm(dim)
        self.q = Conv2d(dim, dim, 1)
        self.kv = Conv2d(dim, 2 * dim, 1)
        self.proj = Conv2d(dim, dim, 1)
        self.proj_drop = Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], at any height and width."""
        # qkv, q and kv are passed on without a name, so that they are freed before the next step
        local = grid_attention(self.qkv(self.norm(x)), self.num_heads, self.grid_size, residual=x)  # Eq. 6-9
        a1 = self.grid_norm(local)
        pooled = self.pool_norm(average_pool(a1, self.pool_size))  # Eq. 10
        a2 = global_attention(self.q(a1), self.kv(pooled), self.num_heads, residual=a1)  # Eq. 11-13, A1 + A2 of Eq. 14
        return self.proj_drop(self.proj(a2))  # Eq. 14; its residual is in the block

    def attention_weights(self, x: Tensor) -> AttentionWeights:
        """Return the local and global weights that ``forward`` attends with.

        Args:
            x: [B, C, H, W], the input of ``forward``.
        """
        qkv = self.qkv(self.norm(x))
        a1 = self.grid_norm(grid_attention(qkv, self.num_heads, self.grid_size, residual=x))
        pooled = self.pool_norm(average_pool(a1, self.pool_size))
        q, k, _ = _heads_of(self.num_heads, self.q(a1), self.kv(pooled))
        local = grid_attention_weights(qkv, self.num_heads, self.grid_size)
        return AttentionWeights(local, reference.attention_weights(q, k))

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return f"num_heads={self.num_heads}, grid_size={self.grid_size}, pool_size={self.pool_size}"


class Attention(nn.Module):
    """Plain MHSA (Eq. 1-2 and the projection of Eq. 3), the attention of stage 5.

    The residual of Eq. 3 is outside, in the block.

    Args:
        dim: C, number of input and output channels.
        head_dim: channels of one head; divides ``dim``.
        proj_drop_rate: rate of the channel dropout after ``proj``.

    Raises:
        ValueError: if ``head_dim`` does not divide ``dim``.
    """

    def __init__(self, dim: int, head_dim: int = 64, proj_drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_heads = _num_heads(dim, head_dim)
        self.norm = GroupNorm(dim)
        self.qkv = Conv2d(dim, 3 * dim, 1)
        self.proj = Conv2d(dim, dim, 1)
        self.proj_drop = Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], at any height and width."""
        return self.proj_drop(self.proj(self_attention(self.qkv(self.norm(x)), self.num_heads)))

    def attention_weights(self, x: Tensor) -> Tensor:
        """Return the weights [B, heads, H·W, H·W] that ``forward`` attends with; each row sums to 1.

        Args:
            x: [B, C, H, W], the input of ``forward``.
        """
        q, k, _ = _heads_of(self.num_heads, self.qkv(self.norm(x)))
        return reference.attention_weights(q, k)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return f"num_heads={self.num_heads}"


class WindowAttention(nn.Module):
    """Swin's window attention with relative position bias, which Table 5 puts in the place of H-MHSA.

    Unlike G1, the window size is bound to parameters, those of the bias. The residual is outside, in the block.

    Args:
        dim: C, number of input and output channels.
        head_dim: channels of one head; divides ``dim``.
        window_size: M, side of a window in positions; Swin's is 7.
        shifted: shift the windows by ⌊M/2⌋, as Swin does in every second block.
        proj_drop_rate: rate of the channel dropout after ``proj``.

    Raises:
        ValueError: if ``head_dim`` does not divide ``dim``, or ``window_size`` is not positive.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int = 64,
        window_size: int = 7,
        shifted: bool = False,
        proj_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = _num_heads(dim, head_dim)
        self.window_size = positive_int("window_size", window_size)
        self.shift = window_size // 2 if shifted else 0
        self.norm = GroupNorm(dim)
        self.qkv = Conv2d(dim, 3 * dim, 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = Conv2d(dim, dim, 1)
        self.proj_drop = Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], at any height and width."""
        index = _relative_position_index(self.window_size, x.device)
        bias = self.relative_position_bias_table[index]  # [M², M², heads]
        qkv = self.qkv(self.norm(x))
        out = window_attention(qkv, self.num_heads, bias.permute(2, 0, 1), self.window_size, self.shift)
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}"


@torch.fx.wrap
def grid_attention(qkv: Tensor, num_heads: int, grid_size: int, residual: Tensor | None = None) -> Tensor:
    """Local attention inside each G1×G1 grid (Eq. 6-8), plus ``residual`` (Eq. 9).

    Where ``grid_size`` does not divide H or W, the map is zero-padded at the bottom and right. Padding is masked out
    of the softmax and cropped from the result, so it changes nothing.

    Args:
        qkv: [B, 3C, H, W], channels laid out as (q | k | v) × heads × head_dim.
        num_heads: number of heads; divides C.
        grid_size: G1, side of a grid in positions.
        residual: [B, C, H, W], added to the result.

    Returns:
        [B, C, H, W], the dtype of ``qkv``; with ``residual`` that of the sum, unless a kernel computes it.
    """
    if kernels.path(qkv) == "triton":
        from hatnet_core.kernels import triton_attention

        if triton_attention.supports(qkv, num_heads, grid_size):
            return triton_attention.grid_attention(qkv, num_heads, grid_size, residual)
    batch, _, height, width = qkv.shape
    grid = _grid_shape(height, width, grid_size)
    mask = None
    if not (statically_true(height % grid[0] == 0) and statically_true(width % grid[1] == 0)):
        qkv = pad_to_multiple(qkv, grid)
        mask = padding_mask(height, width, grid, qkv.device).repeat(batch, 1, 1, 1)  # [B·grids, 1, 1, n]
    out = attend(split_heads(grid_partition(qkv, grid), 3, num_heads), mask)  # [B·grids, heads, n, head_dim]
    out = grid_reverse(out, batch, height, width, grid)  # [B, C, H', W']
    out = lay_out(out if mask is None else crop(out, height, width))
    return out if residual is None else residual + out


def grid_attention_weights(qkv: Tensor, num_heads: int, grid_size: int) -> Tensor:
    """Attention weights of :func:`grid_attention`, [B, heads, rows, columns, n, n] for grids of n positions."""
    batch, _, height, width = qkv.shape
    grid = _grid_shape(height, width, grid_size)
    mask = padding_mask(height, width, grid, qkv.device).repeat(batch, 1, 1, 1)
    q, k, _ = split_heads(grid_partition(pad_to_multiple(qkv, grid), grid), 3, num_heads)
    rows, columns = grid_count(height, grid[0]), grid_count(width, grid[1])
    weights = reference.attention_weights(q, k, mask)  # [B·grids, heads, n, n]
    return weights.view(batch, rows, columns, *weights.shape[1:]).movedim(3, 1)


@torch.fx.wrap
def global_attention(q: Tensor, kv: Tensor, num_heads: int, residual: Tensor | None = None) -> Tensor:
    """Attention of all positions of ``q`` to all positions of ``kv`` (Eq. 11, 13), plus ``residual`` (Eq. 14).

    Args:
        q: [B, C, H, W], channels laid out as heads × head_dim.
        kv: [B, 2C, H', W'], channels laid out as (k | v) × heads × head_dim.
        num_heads: number of heads; divides C.
        residual: [B, C, H, W], added to the result.

    Returns:
        [B, C, H, W], the dtype of ``q``; with ``residual`` that of the sum, unless a kernel computes it.
    """
    if kernels.path(q, kv) == "triton":
        from hatnet_core.kernels import triton_attention

        if triton_attention.supports_pooled(q, kv, num_heads):
            return triton_attention.pooled_attention(q, kv, num_heads, residual)
    out = _to_map(attend(_heads_of(num_heads, q, kv)), q)
    return out if residual is None else residual + out


@torch.fx.wrap
def self_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Attention of all positions to all positions (Eq. 1-2).

    Args:
        qkv: [B, 3C, H, W], channels laid out as (q | k | v) × heads × head_dim.
        num_heads: number of heads; divides C.

    Returns:
        [B, C, H, W], the dtype of ``qkv``.
    """
    if kernels.path(qkv) == "triton":
        from hatnet_core.kernels import triton_attention

        height, width = qkv.shape[2:]  # few positions are a single grid
        if height * width <= triton_attention.POOLED_POSITIONS:
            return grid_attention(qkv, num_heads, max(height, width))
    return _to_map(attend(_heads_of(num_heads, qkv)), qkv)


@torch.fx.wrap
def window_attention(qkv: Tensor, num_heads: int, bias: Tensor, window_size: int, shift: int) -> Tensor:
    """Attention inside windows of the map rolled by ``shift``, as in Swin (Liu et al., ICCV 2021, Sec. 3.2).

    Positions brought together by the shift are masked from each other, and padding is masked. An axis along which one
    window is enough is not rolled.

    Args:
        qkv: [B, 3C, H, W], channels laid out as (q | k | v) × heads × head_dim.
        num_heads: number of heads; divides C.
        bias: [heads, M², M²], added to the scaled products; M is ``window_size``.
        window_size: M, side of a window in positions.
        shift: positions by which the windows move right and down, in [0, M).

    Returns:
        [B, C, H, W], the dtype of ``qkv``.
    """
    batch, _, height, width = qkv.shape
    window = (window_size, window_size)
    # 1 where one window covers the axis, else 0; integers, since a condition would bind a symbolic size
    single = [1 // grid_count(side, window_size) for side in (height, width)]
    shifts = [shift * (1 - one) for one in single]
    qkv = pad_to_multiple(qkv, window).roll([-s for s in shifts], dims=(-2, -1))
    allowed = window_mask(height, width, shifts, window_size, qkv.device)  # [windows, 1, M², M²]
    mask = torch.where(allowed, bias, -torch.inf).to(qkv.dtype)  # [windows, heads, M², M²]
    out = attend(split_heads(grid_partition(qkv, window), 3, num_heads), mask.repeat(batch, 1, 1, 1))
    out = grid_reverse(out, batch, height, width, window).roll(shifts, dims=(-2, -1))
    return lay_out(crop(out, height, width))


@torch.fx.wrap
def average_pool(x: Tensor, pool_size: int) -> Tensor:
    """Average pooling in which pools at the border average the positions that exist (the pooling of Eq. 10).

    Args:
        x: [B, C, H, W].
        pool_size: G2, kernel and stride.

    Returns:
        [B, C, ⌈H/G2⌉, ⌈W/G2⌉], the dtype of ``x``.
    """
    if kernels.path(x) == "triton":
        from hatnet_core.kernels import triton_pool

        return triton_pool.average_pool(x, pool_size)
    height, width = x.shape[-2:]
    if not torch.compiler.is_compiling():
        return F.avg_pool2d(x, pool_size, ceil_mode=True)
    if statically_true(height % pool_size == 0) and statically_true(width % pool_size == 0):
        return F.avg_pool2d(x, pool_size)
    # ceil_mode asks for the size itself, and exporters differ in what they divide by at the border
    pools = (pool_size, pool_size)
    valid = pad_to_multiple(x.new_ones(1, 1, height, width), pools)  # 1 on the map, 0 in padding
    return F.avg_pool2d(pad_to_multiple(x, pools), pool_size) / F.avg_pool2d(valid, pool_size)


def attend(qkv: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d)V (Eq. 2), fused unless ``set_kernels("reference")``.

    Args:
        qkv: queries, keys and values; see ``reference.attend``. As one argument, they are freed after the call.
        mask: see ``reference.attend``.
    """
    q, k, v = qkv
    if kernels.mode() == "reference":
        return reference.attend(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def grid_count(side: int, grid_size: int) -> int:
    """Count the grids along an axis, ⌈side / grid_size⌉."""
    return (side + grid_size - 1) // grid_size


def pad_to_multiple(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[..., H, W] → [..., H', W'], zero-padded at the bottom and right to multiples of the sides of a grid."""
    pad_h, pad_w = (grid_count(side, g) * g - side for side, g in zip(x.shape[-2:], grid, strict=True))
    return F.pad(x, (0, pad_w, 0, pad_h))


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """[..., H', W'] → [..., H, W], the inverse of :func:`pad_to_multiple`."""
    # a slice would compare symbolic sizes; negative padding does not
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))


def padding_mask(height: int, width: int, grid: tuple[int, int], device: torch.device) -> Tensor:
    """[grids, 1, 1, n] booleans of the padded map in grids of n positions; False in padding."""
    padded_h, padded_w = (grid_count(side, g) * g for side, g in zip((height, width), grid, strict=True))
    valid_rows = torch.arange(padded_h, device=device) < height
    valid_columns = torch.arange(padded_w, device=device) < width
    valid = valid_rows[:, None] & valid_columns  # [H', W']
    return grid_partition(valid[None, None], grid).transpose(1, 2).unsqueeze(1)


def window_mask(height: int, width: int, shifts: list[int], window_size: int, device: torch.device) -> Tensor:
    """[windows, 1, M², M²] booleans of the padded and rolled map; True where one position may attend to another.

    Both have to be in the same region along each axis: windows before the last, in the last window the part before the
    seam of the roll, the part after it, or padding.
    """
    regions = [_regions(side, shift, window_size, device) for side, shift in zip((height, width), shifts, strict=True)]
    sides = regions[0].shape[0], regions[1].shape[0]  # len() would bind a symbolic size
    labels = torch.stack([regions[0][:, None].expand(sides), regions[1].expand(sides)])  # [2, H', W']
    labels = grid_partition(labels[None], (window_size, window_size))  # [windows, M², 2]
    return (labels.unsqueeze(1) == labels.unsqueeze(2)).all(-1).unsqueeze(1)


def _regions(side: int, shift: int, window_size: int, device: torch.device) -> Tensor:
    """[side'] region 0-3 of each position along an axis of the padded and rolled map; see :func:`window_mask`."""
    padded = grid_count(side, window_size) * window_size
    position = torch.arange(padded, device=device)
    region = (position >= padded - window_size).int() + (position >= padded - shift).int()
    is_padding = (position + shift) % padded >= side  # where the position was before the roll
    return torch.where(is_padding, 3, region)


def grid_partition(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, C, H, W] → [B·grids, n, C], the n = g·g' positions of each g×g' grid side by side (Eq. 6)."""
    b, c, h, w = x.shape
    rows, columns = h // grid[0], w // grid[1]
    x = x.permute(0, 2, 3, 1).reshape(b, rows, grid[0], columns, grid[1], c).transpose(2, 3)
    return _contiguous_copy(x).view(b * rows * columns, grid[0] * grid[1], c)


def grid_reverse(x: Tensor, batch: int, height: int, width: int, grid: tuple[int, int]) -> Tensor:
    """[B·grids, heads, n, head_dim] → [B, C, H', W'], the padded map; inverse of :func:`grid_partition` (Eq. 8)."""
    heads, head_dim = x.shape[1], x.shape[3]
    rows, columns = grid_count(height, grid[0]), grid_count(width, grid[1])
    x = x.reshape(batch, rows, columns, heads, *grid, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    x = _contiguous_copy(x).view(batch, rows * grid[0], columns * grid[1], heads * head_dim)
    return x.permute(0, 3, 1, 2)


def split_heads(tokens: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """[B, n, parts·heads·head_dim] → as many views [B, heads, n, head_dim], such as queries, keys and values."""
    b, n, channels = tokens.shape
    return tokens.view(b, n, parts, num_heads, channels // (parts * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)


def _heads_of(num_heads: int, *maps: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v [B, heads, H·W, head_dim] of [B, 3C, H, W], or of [B, C, H, W] and [B, 2C, H', W']."""
    dim = sum(m.shape[1] for m in maps) // 3
    return tuple(part for m in maps for part in split_heads(_tokens(m), m.shape[1] // dim, num_heads))


def _tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H·W, C], the channels of a position side by side, as fused attention wants."""
    x = x.flatten(2).transpose(1, 2)
    return _contiguous_copy(x) if torch.compiler.is_exporting() else x.contiguous()


def _to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, heads, H·W, head_dim] → [B, C, H, W], with the sides of ``like``."""
    batch, _, height, width = like.shape
    dim = tokens.shape[1] * tokens.shape[3]
    return lay_out(tokens.transpose(1, 2).reshape(batch, height, width, dim).permute(0, 3, 1, 2))


def _grid_shape(height: int, width: int, grid_size: int) -> tuple[int, int]:
    """Sides of a grid; a map that is smaller than G1 is one grid and needs no padding."""
    grid_h, grid_w = (side if statically_true(side <= grid_size) else grid_size for side in (height, width))
    return grid_h, grid_w


def _contiguous_copy(x: Tensor) -> Tensor:
    """Copy always: to ask whether it is needed would bind an exported program to a size."""
    return x.clone(memory_format=torch.contiguous_format)


def statically_true(condition: bool) -> bool:
    """Return whether a condition on sizes holds; of symbolic sizes, whether it holds whatever they are.

    To ask a symbolic condition itself would bind the compiled or exported graph to the answer.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, needed only here

    return statically_known_true(condition)


@torch.fx.wrap
def _relative_position_index(window_size: int, device: torch.device) -> Tensor:
    """[M², M²] row of the bias table for each pair of positions of a window."""
    side = torch.arange(window_size, device=device)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
    row_distance = rows[:, None] - rows + window_size - 1
    column_distance = columns[:, None] - columns + window_size - 1
    return row_distance * (2 * window_size - 1) + column_distance


def _num_heads(dim: int, head_dim: int) -> int:
    positive_int("dim", dim)
    positive_int("head_dim", head_dim)
    if dim % head_dim:
        raise ValueError(f"head_dim must divide the number of channels, got head_dim={head_dim} and dim={dim}")
    return dim // head_dim
