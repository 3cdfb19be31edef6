"""Build models by name."""

from __future__ import annotations

from typing import Any

from hatnet_core.model import HATNet
from hatnet_core.pretrained import load_pretrained
from hatnet_core.variants import model_arguments


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> HATNet:
    """Build a HAT-Net, with freshly initialised weights or those released with the paper.

    Args:
        name: one of :func:`hatnet_core.list_models`, ablations included.
        pretrained: load the weights that the paper's authors released for the four models of Table 1, downloaded
            to torch's hub folder at the first call (see :mod:`hatnet_core.pretrained`). With other than 1000 classes
            the head keeps its fresh weights; for other than three input channels the stem is adapted.
        **kwargs: arguments of :class:`HATNet` that override those of the variant, such as ``num_classes``,
            ``in_chans`` or ``drop_path_rate``.

    Returns:
        The model, in training mode, fp32, on the current default device.

    Raises:
        ValueError: if the name is unknown, an argument is out of range, or the model has no released weights or other
            parameters than they do.
        OSError: if the weights cannot be downloaded.

    Example:
        >>> model = create_model("hatnet_tiny", num_classes=10)
        >>> model.num_features
        384
    """
    model = HATNet(**{**model_arguments(name), **kwargs})
    if pretrained:
        load_pretrained(model, name)
    return model
