"""HAT-Net in MMDetection and MMSegmentation; importing this registers what a config of theirs names.

In MMEngine's root registries, which those of both libraries fall back to: ``HATNetBackbone``, the optimizer
constructor ``LayerDecayConstructor``, the hooks ``PlainCheckpointHook`` and ``DataCheckHook``, and ``ZeroStrategy``,
for training with DeepSpeed, which is imported when a config asks for it.
"""

import warnings
from typing import TYPE_CHECKING, Any

from hatnet_dense.__about__ import __version__

if TYPE_CHECKING:
    from hatnet_dense.deepspeed_strategy import ZeroStrategy

_CLASSES = ("HATNetBackbone", "LayerDecayConstructor", "PlainCheckpointHook", "DataCheckHook", "ZeroStrategy")
_reason: Exception | None = None

try:
    from mmengine.registry import STRATEGIES

    import hatnet_dense.config  # noqa: F401  # lets MMEngine find the configs of a fork of MMSegmentation
    from hatnet_dense.backbone import HATNetBackbone
    from hatnet_dense.data_check import DataCheckHook
    from hatnet_dense.layer_decay import LayerDecayConstructor
    from hatnet_dense.plain_checkpoint import PlainCheckpointHook

    @STRATEGIES.register_module(name="ZeroStrategy")  # type: ignore[untyped-decorator]  # mmengine ships no types
    def _zero_strategy(**arguments: Any) -> Any:
        from hatnet_dense.deepspeed_strategy import ZeroStrategy

        return ZeroStrategy(**arguments)

except Exception as error:  # `hatnet-dense doctor` has to run where MMEngine is absent, or broken in whatever way
    _reason = error
    warnings.warn(f"nothing of hatnet_dense is registered: {error}", RuntimeWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module 'hatnet_dense' has no attribute {name!r}")
    if _reason is not None:
        message = f"hatnet_dense.{name} needs MMEngine: {_reason}; 'hatnet-dense doctor' says what fixes it"
        raise ImportError(message) from _reason
    from hatnet_dense.deepspeed_strategy import ZeroStrategy

    return ZeroStrategy


__all__ = [
    "DataCheckHook",
    "HATNetBackbone",
    "LayerDecayConstructor",
    "PlainCheckpointHook",
    "ZeroStrategy",
    "__version__",
]
