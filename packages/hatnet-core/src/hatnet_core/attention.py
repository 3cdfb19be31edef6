"""Hierarchical multi-head self-attention (H-MHSA, Sec. 3.2, Eq. 6-14) and the plain MHSA of the last stage.

Read :class:`HierarchicalAttention` first: its ``forward`` is Eq. 6-14 in order. The two functions above it are
the two attentions, local and global; everything is B×C×H×W outside and tokens inside.
"""

from __future__ import annotations

import operator

import torch.nn.functional as F
from torch import Tensor, nn

from hatnet_core.layers import group_norm


def grid_attention(qkv: Tensor, num_heads: int, grid_size: int) -> Tensor:
    """Local attention inside each G1×G1 grid (Eq. 6-8).

    Where ``grid_size`` does not divide H or W, the last grids are completed at the right and bottom; completed
    positions are masked out of the softmax and cropped from the result, so they change nothing.

    Args:
        qkv: [B, 3C, H, W], channels laid out as (q | k | v) × heads × head_dim.
        num_heads: number of heads; divides C.
        grid_size: G1, side of a grid in positions.

    Returns:
        [B, C, H, W], the dtype of ``qkv``.
    """
    height, width = qkv.shape[-2:]
    grid = (
        min(grid_size, height),
        min(grid_size, width),
    )  # one grid holds a smaller map whole, with nothing to complete
    pad_h, pad_w = -height % grid[0], -width % grid[1]
    mask = None
    if pad_h or pad_w:
        qkv = F.pad(qkv, (0, pad_w, 0, pad_h))
        exists = F.pad(qkv.new_ones(1, 1, height, width), (0, pad_w, 0, pad_h))
        mask = _grids(exists, 1, grid).transpose(-2, -1).bool()  # [grids, 1, 1, positions of a grid]
        mask = mask.repeat(qkv.shape[0], 1, 1, 1)
    q, k, v = (_grids(t, num_heads, grid) for t in qkv.chunk(3, dim=1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return _ungrid(out, height + pad_h, width + pad_w, grid)[..., :height, :width]


def token_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of all positions of ``q`` to all positions of ``k`` and ``v`` (Eq. 2, 11 and 13).

    Args:
        q: [B, C, H, W].
        k: [B, C, H', W'].
        v: [B, C, H', W'].
        num_heads: number of heads; divides C.

    Returns:
        [B, C, H, W], the dtype of ``q``.
    """
    out = F.scaled_dot_product_attention(_tokens(q, num_heads), _tokens(k, num_heads), _tokens(v, num_heads))
    return out.transpose(-2, -1).reshape(q.shape)


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
        self.norm = group_norm(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.grid_norm = group_norm(dim)
        self.pool_norm = group_norm(dim)
        self.q = nn.Conv2d(dim, dim, 1)
        self.kv = nn.Conv2d(dim, 2 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], at any height and width."""
        local = grid_attention(self.qkv(self.norm(x)), self.num_heads, self.grid_size)  # Eq. 6-8
        a1 = self.grid_norm(x + local)  # Eq. 9
        # Eq. 10; with ceil_mode a pool over the edge averages the positions that exist
        pooled = self.pool_norm(F.avg_pool2d(a1, self.pool_size, ceil_mode=True))
        k, v = self.kv(pooled).chunk(2, dim=1)
        a2 = token_attention(self.q(a1), k, v, self.num_heads)  # Eq. 11-13
        return self.proj_drop(self.proj(a1 + a2))  # Eq. 14, its residual left to the block

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
        self.norm = group_norm(dim)
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.proj_drop = nn.Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W], at any height and width."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        return self.proj_drop(self.proj(token_attention(q, k, v, self.num_heads)))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return f"num_heads={self.num_heads}"


def positive_int(name: str, value: int) -> int:
    """``value`` as an int; ValueError naming it unless it is an integer of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return operator.index(value)


def _num_heads(dim: int, head_dim: int) -> int:
    positive_int("dim", dim)
    positive_int("head_dim", head_dim)
    if dim % head_dim:
        raise ValueError(f"head_dim must divide the number of channels, got head_dim={head_dim} and dim={dim}")
    return dim // head_dim


def _tokens(x: Tensor, num_heads: int) -> Tensor:
    """[B, heads·d, H, W] → [B, heads, H·W, d]."""
    b, c, h, w = x.shape
    return x.reshape(b, num_heads, c // num_heads, h * w).transpose(-2, -1)


def _grids(x: Tensor, num_heads: int, grid: tuple[int, int]) -> Tensor:
    """[B, heads·d, H, W] → [B·(H/g)·(W/g'), heads, g·g', d] for grids of g×g', which divide H and W (Eq. 6)."""
    b, c, h, w = x.shape
    x = x.reshape(b, num_heads, c // num_heads, h // grid[0], grid[0], w // grid[1], grid[1])
    return x.permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, num_heads, grid[0] * grid[1], c // num_heads)


def _ungrid(x: Tensor, h: int, w: int, grid: tuple[int, int]) -> Tensor:
    """[B·(h/g)·(w/g'), heads, g·g', d] → [B, heads·d, h, w], the inverse of :func:`_grids` (Eq. 8)."""
    heads, d = x.shape[1], x.shape[3]
    x = x.reshape(-1, h // grid[0], w // grid[1], heads, *grid, d)
    return x.permute(0, 3, 6, 1, 4, 2, 5).reshape(-1, heads * d, h, w)
