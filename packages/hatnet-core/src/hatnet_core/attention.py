"""Hierarchical multi-head self-attention (H-MHSA, Sec. 3.2, Eq. 6-14) and its relatives.

Read :class:`HierarchicalAttention` first: its ``forward`` is Eq. 6-14 in order. :class:`Attention` is the plain MHSA
of the last stage, :class:`WindowAttention` the one that Table 5 compares with. The functions above them are the three
attentions on ready queries, keys and values; everything is B×C×H×W outside and tokens inside.

The functions are whole nodes to ``torch.fx``, and compile and export to one graph for every size: where a size is
symbolic they take the masked way, which is right at any size, instead of asking whether the grids fit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hatnet_core import kernels
from hatnet_core.config import positive_int as positive_int  # for hatnet-analysis, too
from hatnet_core.layers import GroupNorm


@torch.fx.wrap
def grid_attention(qkv: Tensor, num_heads: int, grid_size: int, residual: Tensor | None = None) -> Tensor:
    """Local attention inside each G1×G1 grid (Eq. 6-8), plus ``residual`` (Eq. 9).

    Where ``grid_size`` does not divide H or W, the last grids are completed at the right and bottom; completed
    positions are masked out of the softmax and cropped from the result, so they change nothing.

    Args:
        qkv: [B, 3C, H, W], channels laid out as (q | k | v) × heads × head_dim.
        num_heads: number of heads; divides C.
        grid_size: G1, side of a grid in positions.
        residual: [B, C, H, W], added to the result.

    Returns:
        [B, C, H, W], the dtype of ``qkv``; with ``residual``, of the sum where no kernel computes it.
    """
    fast = kernels.grid_attention(qkv, num_heads, grid_size, residual)
    if fast is not None:
        return fast
    batch, _, height, width = qkv.shape
    # a grid that holds a smaller map whole needs no completion
    grid = tuple(side if _holds(side <= grid_size) else grid_size for side in (height, width))
    mask = None
    if not (_holds(height % grid[0] == 0) and _holds(width % grid[1] == 0)):
        qkv = _complete(qkv, grid)
        exists = _in_grids(_exists(height, grid[0], qkv), _exists(width, grid[1], qkv), grid)
        mask = exists.unsqueeze(1).repeat(batch, 1, 1, 1)  # [B·grids, 1, 1, positions of a grid]
    q, k, v = _grids(qkv, num_heads, grid)
    out = kernels.attend(q, k, v, mask)
    out = _ungrid(out, batch, _count(height, grid[0]), _count(width, grid[1]), grid)
    out = kernels.laid_out(out if mask is None else _crop(out, height, width))
    return out if residual is None else residual + out


@torch.fx.wrap
def token_attention(num_heads: int, *maps: Tensor, residual: Tensor | None = None) -> Tensor:
    """Attention of all positions to all positions of keys and values (Eq. 2, 11, 13), plus ``residual`` (Eq. 14).

    Args:
        num_heads: number of heads; divides C.
        *maps: queries, keys and values of C channels each, in this order: one map [B, 3C, H, W], or [B, C, H, W] and
            [B, 2C, H', W'].
        residual: [B, C, H, W], added to the result.

    Returns:
        [B, C, H, W], the dtype of the maps; with ``residual``, of the sum where no kernel computes it.
    """
    fast = kernels.token_attention(num_heads, maps, residual)
    if fast is not None:
        return fast
    batch, _, height, width = maps[0].shape
    dim = sum(m.shape[1] for m in maps) // 3
    q, k, v = (tokens for m in maps for tokens in _tokens(m, m.shape[1] // dim, num_heads))
    out = kernels.attend(q, k, v).transpose(1, 2).reshape(batch, height, width, dim)
    out = kernels.laid_out(out.permute(0, 3, 1, 2))
    return out if residual is None else residual + out


@torch.fx.wrap
def window_attention(qkv: Tensor, num_heads: int, bias: Tensor, window_size: int, shift: int) -> Tensor:
    """Attention inside windows of the map rolled by ``shift``, as in Swin (Liu et al., ICCV 2021, Sec. 3.2).

    Positions that only the roll brings into one window do not see each other, nor do existing and completed ones.
    A map no larger than a window is not rolled.

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
    rows, columns = counts = _count(height, window_size), _count(width, window_size)
    shifts = [shift * (1 - 1 // count) for count in counts]  # 0 where there is one window
    qkv = _complete(qkv, window).roll([-s for s in shifts], dims=(-2, -1))
    regions_h = _window_regions(height, rows, shifts[0], window_size, qkv.device)
    regions_w = _window_regions(width, columns, shifts[1], window_size, qkv.device)
    regions = _in_grids(6 * regions_h, regions_w, window)
    allowed = (regions.transpose(-2, -1) == regions).unsqueeze(1)  # [windows, 1, M², M²]
    mask = torch.where(allowed, bias, -torch.inf).to(qkv.dtype)  # [windows, heads, M², M²]
    q, k, v = _grids(qkv, num_heads, window)
    out = kernels.attend(q, k, v, mask.repeat(batch, 1, 1, 1))
    out = _ungrid(out, batch, rows, columns, window).roll(shifts, dims=(-2, -1))
    return kernels.laid_out(_crop(out, height, width))


@torch.fx.wrap
def average_pool(x: Tensor, pool_size: int) -> Tensor:
    """Average pooling whose last pools average the positions that exist (the pooling of Eq. 10).

    Args:
        x: [B, C, H, W].
        pool_size: G2, kernel and stride.

    Returns:
        [B, C, ⌈H/G2⌉, ⌈W/G2⌉], the dtype of ``x``.
    """
    fast = kernels.average_pool(x, pool_size)
    if fast is not None:
        return fast
    height, width = x.shape[-2:]
    if not torch.compiler.is_compiling():
        return F.avg_pool2d(x, pool_size, ceil_mode=True)
    if _holds(height % pool_size == 0) and _holds(width % pool_size == 0):
        return F.avg_pool2d(x, pool_size)
    # ceil_mode decides on the size itself, and exporters differ in what they divide by at the edge
    pools = (pool_size, pool_size)
    exists = _complete(x.new_ones(1, 1, height, width), pools)
    return F.avg_pool2d(_complete(x, pools), pool_size) / F.avg_pool2d(exists, pool_size)


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
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.grid_norm = GroupNorm(dim)
        self.pool_norm = GroupNorm(dim)
        self.q = nn.Conv2d(dim, dim, 1)
        self.kv = nn.Conv2d(dim, 2 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], at any height and width."""
        conv, fused = kernels.pointwise, kernels.adds_residuals(x)
        local = grid_attention(  # Eq. 6-8
            conv(self.qkv, self.norm(x)), self.num_heads, self.grid_size, residual=x if fused else None
        )
        a1 = self.grid_norm(local if fused else x + local)  # Eq. 9
        pooled = self.pool_norm(average_pool(a1, self.pool_size))  # Eq. 10
        a2 = token_attention(  # Eq. 11-13
            self.num_heads, conv(self.q, a1), conv(self.kv, pooled), residual=a1 if fused else None
        )
        return self.proj_drop(conv(self.proj, a2 if fused else a1 + a2))  # Eq. 14, its residual left to the block

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
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
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], at any height and width."""
        conv = kernels.pointwise
        return self.proj_drop(conv(self.proj, token_attention(self.num_heads, conv(self.qkv, self.norm(x)))))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return f"num_heads={self.num_heads}"


class WindowAttention(nn.Module):
    """Swin's window attention with relative position bias, which Table 5 puts in the place of H-MHSA.

    Unlike G1, the window size is bound to parameters, those of the bias. The residual is outside, in the block.

    Args:
        dim: C, number of input and output channels.
        head_dim: channels of one head; divides ``dim``.
        window_size: M, side of a window in positions; Swin's is 7.
        shifted: whether the windows are moved by ⌊M/2⌋, as Swin does in every second block.
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
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], at any height and width."""
        index = _relative_position_index(self.window_size, x.device)
        bias = self.relative_position_bias_table[index].permute(2, 0, 1)  # [heads, M², M²]
        qkv = self.qkv(self.norm(x))
        return self.proj_drop(self.proj(window_attention(qkv, self.num_heads, bias, self.window_size, self.shift)))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift}"


def _num_heads(dim: int, head_dim: int) -> int:
    positive_int("dim", dim)
    positive_int("head_dim", head_dim)
    if dim % head_dim:
        raise ValueError(f"head_dim must divide the number of channels, got head_dim={head_dim} and dim={dim}")
    return dim // head_dim


def _holds(condition: bool) -> bool:
    """Whether a condition on sizes holds; of a symbolic size, whether it holds whatever the size is.

    Asking a symbolic condition itself would bind the compiled or exported graph to the answer.
    """
    if not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, needed only here

    return statically_known_true(condition)


def _count(side: int, grid_size: int) -> int:
    """⌈side / grid_size⌉, the grids along an axis; whole positions are this times ``grid_size``."""
    return (side + grid_size - 1) // grid_size


def _complete(x: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[..., H, W] → [..., ⌈H/g⌉·g, ⌈W/g'⌉·g'], zeros at the right and bottom."""
    pad_h, pad_w = (_count(side, g) * g - side for side, g in zip(x.shape[-2:], grid, strict=True))
    return F.pad(x, (0, pad_w, 0, pad_h))


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    """[..., H', W'] → [..., H, W], the inverse of :func:`_complete`."""
    return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))  # a slice would compare symbolic sizes


def _tokens(x: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """[B, parts·heads·d, H, W] → as many of [B, heads, H·W, d], channels side by side, as fused attention wants."""
    x = x.flatten(2).transpose(1, 2)
    x = _copied(x) if torch.compiler.is_exporting() else x.contiguous()
    x = x.reshape(*x.shape[:2], parts, num_heads, x.shape[2] // (parts * num_heads))
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def _grids(qkv: Tensor, num_heads: int, grid: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[B, 3·heads·d, H, W] → q, k, v of [B·(H/g)·(W/g'), heads, g·g', d] for grids of g×g' that divide H×W (Eq. 6)."""
    b, c, h, w = qkv.shape
    rows, columns, d = h // grid[0], w // grid[1], c // (3 * num_heads)
    x = qkv.permute(0, 2, 3, 1).reshape(b, rows, grid[0], columns, grid[1], c).transpose(2, 3)
    x = _copied(x).view(b * rows * columns, grid[0] * grid[1], 3, num_heads, d)
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def _ungrid(x: Tensor, b: int, rows: int, columns: int, grid: tuple[int, ...]) -> Tensor:
    """[B·rows·columns, heads, g·g', d] → [B, heads·d, rows·g, columns·g'], the inverse of :func:`_grids` (Eq. 8)."""
    heads, d = x.shape[1], x.shape[3]
    x = x.reshape(b, rows, columns, heads, *grid, d).permute(0, 1, 4, 2, 5, 3, 6)
    return _copied(x).view(b, rows * grid[0], columns * grid[1], heads * d).permute(0, 3, 1, 2)


def _copied(x: Tensor) -> Tensor:
    """A contiguous copy, not asking whether one is needed: the answer would bind an exported program to a size."""
    return x.clone(memory_format=torch.contiguous_format)


def _exists(side: int, grid_size: int, like: Tensor) -> Tensor:
    """[⌈side/g⌉·g] booleans along an axis of the completed map: whether the position was there before."""
    return torch.arange(_count(side, grid_size) * grid_size, device=like.device) < side


def _in_grids(rows: Tensor, columns: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[H], [W] → [(H/g)·(W/g'), 1, g·g'], their sums (of booleans, the conjunction) in the order of :func:`_grids`."""
    rows, columns = rows.reshape(-1, 1, grid[0], 1), columns.reshape(1, -1, 1, grid[1])
    both = rows & columns if rows.dtype == torch.bool else rows + columns
    return both.reshape(-1, 1, grid[0] * grid[1])


def _window_regions(side: int, count: int, shift: int, window_size: int, device: torch.device) -> Tensor:
    """[count·M] numbers 0-5 along one axis of the rolled map; positions see each other where theirs are equal.

    Swin's three regions (whole windows, the part of the last window before the seam of the roll, the part behind it),
    each divided into positions that exist and completed ones.
    """
    full_side = count * window_size
    position = torch.arange(full_side, device=device)
    region = (position >= full_side - window_size).int() + (position >= full_side - shift).int()
    completed = (position + shift) % full_side >= side
    return 2 * region + completed


@torch.fx.wrap
def _relative_position_index(window_size: int, device: torch.device) -> Tensor:
    """[M², M²] row of the bias table for each pair of positions of a window."""
    side = torch.arange(window_size, device=device)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
    row_distance = rows[:, None] - rows + window_size - 1
    column_distance = columns[:, None] - columns + window_size - 1
    return row_distance * (2 * window_size - 1) + column_distance
