"""The paper's configurations as data: the four models of Table 1 and those of the ablations (Sec. 4.4)."""

from __future__ import annotations

from typing import Any

MIN_SIZE = 32
"""Smallest height and width of an input image in pixels: one position remains after a reduction by 32."""

VARIANTS: dict[str, dict[str, Any]] = {
    "hatnet_tiny": {"embed_dims": (48, 96, 240, 384), "depths": (2, 2, 6, 3), "head_dim": 48},
    "hatnet_small": {"embed_dims": (64, 128, 320, 512), "depths": (2, 3, 8, 3)},
    "hatnet_medium": {
        "embed_dims": (64, 128, 320, 512),
        "depths": (3, 6, 18, 3),
        "kernel_sizes": (5, 3, 5, 3),
    },
    "hatnet_large": {"embed_dims": (64, 128, 320, 640), "depths": (3, 8, 27, 3)},
}
"""Table 1: arguments of :class:`HATNet` by model name; the others have their defaults."""


def _small(**changes: Any) -> dict[str, Any]:
    return {**VARIANTS["hatnet_small"], **changes}


ABLATIONS: dict[str, dict[str, Any]] = {
    # Table 5, from windows everywhere to the full model; the name gives the stages with windows
    "hatnet_small_window234": _small(attention=("window", "window", "window")),
    "hatnet_small_window34": _small(attention=("hierarchical", "window", "window")),
    "hatnet_small_window4": _small(attention=("hierarchical", "hierarchical", "window")),
    # Sec. 4.4
    "hatnet_small_no_depthwise": _small(depthwise=False),
    "hatnet_small_gelu": _small(activation="gelu"),
    # Table 6: G1 and G2 of stages 2-4
    "hatnet_small_grid_8_8_8_pool_8_4_2": _small(grid_sizes=(8, 8, 8), pool_sizes=(8, 4, 2)),
    "hatnet_small_grid_8_8_8_pool_12_6_3": _small(grid_sizes=(8, 8, 8), pool_sizes=(12, 6, 3)),
    "hatnet_small_grid_8_8_8_pool_16_8_4": _small(grid_sizes=(8, 8, 8), pool_sizes=(16, 8, 4)),
    "hatnet_small_grid_8_8_8_pool_32_16_8": _small(grid_sizes=(8, 8, 8), pool_sizes=(32, 16, 8)),
    "hatnet_small_grid_16_16_8_pool_16_8_4": _small(grid_sizes=(16, 16, 8), pool_sizes=(16, 8, 4)),
    # this row's G1 is not legible in the paper; 4, 4, 4 gives the printed FLOPs
    "hatnet_small_grid_4_4_4_pool_16_8_4": _small(grid_sizes=(4, 4, 4), pool_sizes=(16, 8, 4)),
}
"""Models of the paper's ablations, all of them changes to HAT-Net-Small."""


def list_models(ablations: bool = False) -> list[str]:
    """List the names that :func:`hatnet_core.create_model` takes: the four of Table 1, smallest first.

    Args:
        ablations: append the models of the paper's ablations.
    """
    return [*VARIANTS, *ABLATIONS] if ablations else list(VARIANTS)


def model_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of :class:`HATNet` for the name of a variant or ablation.

    Raises:
        ValueError: if the name is unknown; lists the known ones.
    """
    known = VARIANTS | ABLATIONS
    if name not in known:
        raise ValueError(f"model must be one of {', '.join(known)}, got {name!r}")
    return dict(known[name])
