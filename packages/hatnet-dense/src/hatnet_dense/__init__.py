"""HAT-Net in MMDetection and MMSegmentation.

``custom_imports = dict(imports=["hatnet_dense.register"])`` in a config registers the classes of this package, and so
does ``hatnet_dense`` where MMEngine has been imported, as when it reads a config. Otherwise, importing this package
imports no library: ``hatnet-dense --help`` is fast, and ``hatnet-dense doctor`` runs where MMEngine is broken.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from hatnet_dense.__about__ import __version__

if TYPE_CHECKING:
    from hatnet_dense.backbone import HATNetBackbone
    from hatnet_dense.data_check import DataCheckHook
    from hatnet_dense.deepspeed_strategy import ZeroStrategy
    from hatnet_dense.layer_decay import LayerDecayConstructor
    from hatnet_dense.plain_checkpoint import PlainCheckpointHook

_CLASSES = ("HATNetBackbone", "LayerDecayConstructor", "PlainCheckpointHook", "DataCheckHook", "ZeroStrategy")


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module 'hatnet_dense' has no attribute {name!r}")
    try:
        register = importlib.import_module("hatnet_dense.register")
        source = importlib.import_module("hatnet_dense.deepspeed_strategy") if name == "ZeroStrategy" else register
    except Exception as error:  # MMEngine may be missing or broken in any way
        raise ImportError(f"hatnet_dense.{name} needs MMEngine: {error}; 'hatnet-dense doctor' shows a fix") from error
    return getattr(source, name)


if "mmengine" in sys.modules:
    importlib.import_module("hatnet_dense.register")

__all__ = [
    "DataCheckHook",
    "HATNetBackbone",
    "LayerDecayConstructor",
    "PlainCheckpointHook",
    "ZeroStrategy",
    "__version__",
]
