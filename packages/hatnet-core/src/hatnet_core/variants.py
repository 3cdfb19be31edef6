"""The paper's four configurations (Table 1) and :func:`create_model`."""

from __future__ import annotations

from typing import Any

from hatnet_core.model import HATNet

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
"""Arguments of :class:`HATNet` by model name; what a variant does not name is the class's default."""


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, smallest model first."""
    return list(VARIANTS)


def create_model(name: str, **kwargs: Any) -> HATNet:
    """Build a HAT-Net with freshly initialised weights.

    Args:
        name: one of :func:`list_models`.
        **kwargs: arguments of :class:`HATNet`, such as ``num_classes``, ``in_chans`` or ``drop_path_rate``;
            they override those of the variant.

    Returns:
        The model, in training mode, fp32, on the current default device.

    Raises:
        ValueError: if the name is unknown (the known ones are listed) or an argument is out of range.

    Example:
        >>> model = create_model("hatnet_tiny", num_classes=10)
        >>> model.num_features
        384
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(VARIANTS)}")
    return HATNet(**{**VARIANTS[name], **kwargs})
