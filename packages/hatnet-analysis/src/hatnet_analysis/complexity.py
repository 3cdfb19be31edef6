"""Computational complexity of MHSA and H-MHSA in closed form (Eq. 5 and 15).

Both equations leave out the output projection W^p (HWC²), normalisation, softmax and pooling, and count one
multiply-add as one. ``flops.py`` measures built models instead.
"""

from __future__ import annotations

from hatnet_core.attention import positive_int


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
    for name, size in (("grid_size", grid_size), ("pool_size", pool_size)):
        if height % positive_int(name, size) or width % size:
            raise ValueError(f"{name} must divide height and width, got {name}={size} and {height}×{width}")
    pooled = positions // pool_size**2
    return positions * dim * (4 * dim + 2 * grid_size**2) + 2 * pooled * dim * (dim + positions)
