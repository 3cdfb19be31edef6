"""HAT-Net: vision transformers with hierarchical attention (Liu et al., MIR 2024), in PyTorch."""

from hatnet_core.__about__ import __version__
from hatnet_core.attention import HierarchicalAttention
from hatnet_core.checkpoint import load_checkpoint, read_metadata, save_checkpoint
from hatnet_core.factory import create_model
from hatnet_core.kernels import set_kernels
from hatnet_core.model import HATNet
from hatnet_core.variants import list_models

__all__ = [
    "HATNet",
    "HierarchicalAttention",
    "__version__",
    "create_model",
    "list_models",
    "load_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "set_kernels",
]
