"""HAT-Net: vision transformers with hierarchical attention (Liu et al., MIR 2024), in PyTorch.

Read ``attention.py``, then ``model.py``. Adapters to other libraries (``timm``, ``hub``, ``transformers``, ``export``,
``images``, ``flop_handles``) are flat modules, because users import them by these names: ``import hatnet_core.timm``.

Names are imported at their first use, so that the commands' ``--help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hatnet_core.__about__ import __version__

if TYPE_CHECKING:
    from hatnet_core.attention import HierarchicalAttention
    from hatnet_core.checkpoint import load_checkpoint, read_metadata, save_checkpoint
    from hatnet_core.config import HATNetConfig
    from hatnet_core.factory import create_model
    from hatnet_core.kernels import set_kernels
    from hatnet_core.model import HATNet
    from hatnet_core.variants import list_models

_MODULES = {
    "HATNet": "model",
    "HATNetConfig": "config",
    "HierarchicalAttention": "attention",
    "create_model": "factory",
    "list_models": "variants",
    "load_checkpoint": "checkpoint",
    "read_metadata": "checkpoint",
    "save_checkpoint": "checkpoint",
    "set_kernels": "kernels",
}

__all__ = [
    "HATNet",
    "HATNetConfig",
    "HierarchicalAttention",
    "__version__",
    "create_model",
    "list_models",
    "load_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "set_kernels",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
