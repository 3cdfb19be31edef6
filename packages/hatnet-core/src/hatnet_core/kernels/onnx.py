"""Attention for ONNX graphs: maps stay [B, C, H, W], and a runtime copies them only into grids and back.

The transposes in the products below swap the last two axes; runtimes multiply such matrices without a copy.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(num_heads: int, *maps: Tensor) -> Tensor:
    """Attention of all positions to all positions (Eq. 2).

    Args:
        num_heads: number of heads; divides C.
        maps: [B, 3C, H, W], or [B, C, H, W] and [B, 2C, H', W'].

    Returns:
        [B, C, H, W].
    """
    batch, _, height, width = maps[0].shape
    dim = sum(m.shape[1] for m in maps) // 3
    q, k, v = (
        part for m in maps for part in m.reshape(batch, m.shape[1] // dim, num_heads, dim // num_heads, -1).unbind(1)
    )
    return attend(q, k, v).reshape(batch, dim, height, width)


def grid_attention(qkv: Tensor, num_heads: int, grid: tuple[int, int], mask: Tensor | None) -> Tensor:
    """Local attention inside each grid (Eq. 6-8).

    Args:
        qkv: [B, 3C, H', W'], the padded map.
        num_heads: number of heads; divides C.
        grid: its sides in positions; they divide H' and W'.
        mask: [B·grids, 1, 1, n] booleans, False where a key is masked out.

    Returns:
        [B, C, H', W'].
    """
    b, c, h, w = qkv.shape
    rows, columns = h // grid[0], w // grid[1]
    x = qkv.view(b, c, rows, grid[0], columns, grid[1]).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(b * rows * columns, 3, num_heads, c // (3 * num_heads), grid[0] * grid[1])
    q, k, v = x.unbind(1)
    x = attend(q, k, v, mask)  # [B·grids, heads, head_dim, n]
    x = x.reshape(b, rows, columns, c // 3, *grid).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 3, h, w)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QᵀK/√d) as in ``reference.attend``, of [..., d, n], [..., d, m] and [..., d, m] → [..., d, n]."""
    products = (q * q.shape[-2] ** -0.5).transpose(-2, -1) @ k
    if mask is not None:
        products = products.masked_fill(~mask, -float("inf"))
    return v @ F.softmax(products, dim=-1).transpose(-2, -1)
