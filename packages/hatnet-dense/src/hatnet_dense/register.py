"""Register the classes of this package with MMEngine on import, so that configs can name them.

MMDetection and MMSegmentation fall back to MMEngine's root registries, where these classes are.
"""

from typing import Any

from mmengine.registry import STRATEGIES

import hatnet_dense.config  # noqa: F401  # makes MMEngine find configs of forks
from hatnet_dense.backbone import HATNetBackbone
from hatnet_dense.data_check import DataCheckHook
from hatnet_dense.layer_decay import LayerDecayConstructor
from hatnet_dense.plain_checkpoint import PlainCheckpointHook


@STRATEGIES.register_module(name="ZeroStrategy")  # type: ignore[untyped-decorator]  # mmengine ships no types
def _zero_strategy(**arguments: Any) -> Any:
    from hatnet_dense.deepspeed_strategy import ZeroStrategy  # imports DeepSpeed, only for configs that name it

    return ZeroStrategy(**arguments)


__all__ = ["DataCheckHook", "HATNetBackbone", "LayerDecayConstructor", "PlainCheckpointHook"]
