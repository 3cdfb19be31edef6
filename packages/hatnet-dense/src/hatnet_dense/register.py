"""Registration with MMEngine: importing this module lets a config name the classes of this package.

They are in MMEngine's root registries, which those of MMDetection and MMSegmentation fall back to.
"""

from typing import Any

from mmengine.registry import STRATEGIES

import hatnet_dense.config  # noqa: F401  # lets MMEngine find the configs of a fork of MMSegmentation
from hatnet_dense.backbone import HATNetBackbone
from hatnet_dense.data_check import DataCheckHook
from hatnet_dense.layer_decay import LayerDecayConstructor
from hatnet_dense.plain_checkpoint import PlainCheckpointHook


@STRATEGIES.register_module(name="ZeroStrategy")  # type: ignore[untyped-decorator]  # mmengine ships no types
def _zero_strategy(**arguments: Any) -> Any:
    from hatnet_dense.deepspeed_strategy import ZeroStrategy  # imports DeepSpeed, for the configs that name it

    return ZeroStrategy(**arguments)


__all__ = ["DataCheckHook", "HATNetBackbone", "LayerDecayConstructor", "PlainCheckpointHook"]
