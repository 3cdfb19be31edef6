"""The attention as the equations read: explicit softmax, attention weights as a tensor.

Tests and benchmarks compare the fused attention and the kernels with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d)V (Eq. 2).

    Args:
        q: [..., n, d].
        k: [..., m, d].
        v: [..., m, d].
        mask: booleans, False where a key is masked out, or numbers added to the products; broadcast to [..., n, m].

    Returns:
        [..., n, d].
    """
    return attention_weights(q, k, mask) @ v


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d) [..., n, m], each row summing to 1; arguments as for :func:`attend`."""
    products = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if mask is not None:
        products = products.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else products + mask
    return F.softmax(products, dim=-1)
