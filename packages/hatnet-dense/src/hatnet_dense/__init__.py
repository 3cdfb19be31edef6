"""HAT-Net in MMDetection and MMSegmentation; importing this registers what a config of theirs names.

In MMEngine's root registries, which those of both libraries fall back to: ``HATNetBackbone``, the optimizer
constructor ``LayerDecayConstructor``, the hooks ``PlainCheckpointHook`` and ``DataCheckHook``, and ``ZeroStrategy``,
for training with DeepSpeed.
"""

import contextlib
import sys
import warnings
from typing import Any

from hatnet_dense.__about__ import __version__

_CLASSES = ("HATNetBackbone", "LayerDecayConstructor", "PlainCheckpointHook", "DataCheckHook", "ZeroStrategy")

try:
    # MMEngine imports DeepSpeed where it is installed, which logs to whatever stdout is then: not into our JSON
    with contextlib.redirect_stdout(sys.stderr):
        from hatnet_dense.backbone import HATNetBackbone
        from hatnet_dense.data_check import DataCheckHook
        from hatnet_dense.deepspeed_strategy import ZeroStrategy
        from hatnet_dense.layer_decay import LayerDecayConstructor
        from hatnet_dense.plain_checkpoint import PlainCheckpointHook
except Exception as error:  # `hatnet-dense doctor` has to run where MMEngine is absent, or broken in whatever way
    _reason = error
    warnings.warn(f"nothing of hatnet_dense is registered: {error}", RuntimeWarning, stacklevel=2)

    def __getattr__(name: str) -> Any:
        if name in _CLASSES:
            message = f"hatnet_dense.{name} needs MMEngine: {_reason}; 'hatnet-dense doctor' says what mends it"
            raise ImportError(message) from _reason
        raise AttributeError(f"module 'hatnet_dense' has no attribute {name!r}")


__all__ = [
    "DataCheckHook",
    "HATNetBackbone",
    "LayerDecayConstructor",
    "PlainCheckpointHook",
    "ZeroStrategy",
    "__version__",
]
