"""Register HAT-Net with timm: importing this module adds the four models of Table 1.

    import hatnet_core.timm
    timm.create_model("hatnet_small", features_only=True, out_indices=(1, 2, 3))

Needs the extra ``hatnet-core[timm]``. The models have the parameter names of :mod:`hatnet_core`. timm builds them,
loads the released weights (``pretrained=True``) and wraps them like its own.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model

from hatnet_core.checkpoint.released import rename_released
from hatnet_core.checks import stage_indices
from hatnet_core.model import HATNet
from hatnet_core.pretrained import RELEASED_CLASSES, RELEASED_FILES, RELEASED_URL, released_file
from hatnet_core.variants import list_models, model_arguments

WEIGHT_SOURCES = {"url", "file", "state_dict", "hf_hub_id"}
"""Keys of a pretrained_cfg that give a source of weights."""


class TimmHATNet(HATNet):
    """A :class:`HATNet` that is built and called as timm does: ``device``, ``dtype``, and pairs of intermediates.

    A subclass, because both defaults of ``forward_intermediates`` are public: the list of maps in hatnet-core, the
    pair of final features and maps in timm.
    """

    def __init__(
        self, *args: Any, device: str | torch.device | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        with torch.device(device or torch.get_default_device()):
            super().__init__(*args, **kwargs)
        self.to(dtype=dtype)

    forward_intermediates = partialmethod(HATNet.forward_intermediates, intermediates_only=False)


def _cfg(name: str) -> dict[str, Any]:
    return {
        "url": f"{RELEASED_URL}/{RELEASED_FILES[name]}",
        "num_classes": RELEASED_CLASSES,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 224 / 256,  # DeiT's protocol, which Sec. 4.1 follows
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head",
        "paper_name": "Vision Transformers with Hierarchical Attention",
        "origin_url": "https://github.com/yun-liu/HAT-Net",
        "fixed_input_size": False,
    }


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in list_models()})


def _create(name: str, pretrained: bool, **kwargs: Any) -> Any:
    out_indices = tuple(stage_indices(kwargs.pop("out_indices", None)))  # in the order of the maps
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    elsewhere = isinstance(kwargs.get("pretrained_cfg"), dict | PretrainedCfg) or overlay.keys() & WEIGHT_SOURCES
    if pretrained and not elsewhere:  # timm's own download would leave a damaged file in the shared folder
        file = released_file(name, kwargs.get("cache_dir"))
        kwargs["pretrained_cfg_overlay"] = {**overlay, "file": str(file)}
    return build_model_with_cfg(
        TimmHATNet,
        name,
        pretrained,
        pretrained_filter_fn=lambda state, model: rename_released(state)[0],
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **{**model_arguments(name), **kwargs},
    )


@register_model
def hatnet_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """HAT-Net-Tiny (Table 1)."""
    return _create("hatnet_tiny", pretrained, **kwargs)


@register_model
def hatnet_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """HAT-Net-Small (Table 1)."""
    return _create("hatnet_small", pretrained, **kwargs)


@register_model
def hatnet_medium(pretrained: bool = False, **kwargs: Any) -> Any:
    """HAT-Net-Medium (Table 1)."""
    return _create("hatnet_medium", pretrained, **kwargs)


@register_model
def hatnet_large(pretrained: bool = False, **kwargs: Any) -> Any:
    """HAT-Net-Large (Table 1)."""
    return _create("hatnet_large", pretrained, **kwargs)
