"""PyTorch layers that note their hooks, so that a kernel only replaces layers that nobody observes or changed.

``layers.Mlp`` asks :func:`is_stock` before it computes with the weights of its layers instead of calling them.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hatnet_core import kernels


def is_stock(layer: nn.Module) -> bool:
    """Return whether calling a layer does what its class in this module does, and nothing else.

    False for a layer that was replaced (LoRA), made an instance of another class (parametrizations, ``fully_shard``),
    patched or given hooks (pruning, ZeRO-3, feature extraction), or whose settings were changed.
    """
    if not isinstance(layer, Observed) or type(layer) not in (Conv2d, SiLU, GELU, Dropout2d):
        return False
    if layer.has_hooks() or "forward" in vars(layer):
        return False
    if isinstance(layer, Conv2d):  # it may be dilated for segmentation, or padded around the edge for textures
        return _keeps_size(layer)
    if isinstance(layer, Dropout2d):  # one that drops nothing now
        return not layer.training or layer.p == 0
    return getattr(layer, "approximate", "none") == "none"


def _keeps_size(layer: nn.Conv2d) -> bool:
    padding = tuple(side // 2 for side in layer.kernel_size)
    return (layer.stride, layer.dilation, layer.padding, layer.padding_mode) == ((1, 1), (1, 1), padding, "zeros")


class Observed(nn.Module):
    """Base of the layers below: notes the hooks that are registered on it.

    PyTorch keeps hooks in private attributes and has public methods to register them. Hooks on all modules of a
    process (``torch.nn.modules.module.register_module_forward_hook``) are not seen; for them choose
    ``set_kernels("plain")``.
    """

    _handles: tuple[RemovableHandle, ...] = ()

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:  # noqa: D102  of nn.Module
        return self._noted(super().register_forward_hook(*args, **kwargs))

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:  # noqa: D102
        return self._noted(super().register_forward_pre_hook(*args, **kwargs))

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:  # noqa: D102
        return self._noted(super().register_full_backward_hook(*args, **kwargs))

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:  # noqa: D102
        return self._noted(super().register_full_backward_pre_hook(*args, **kwargs))

    def register_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:  # noqa: D102
        return self._noted(super().register_backward_hook(*args, **kwargs))

    def has_hooks(self) -> bool:
        """Return whether a hook is registered and not yet removed."""
        return any(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles)

    def _noted(self, handle: RemovableHandle) -> RemovableHandle:
        live = (h for h in self._handles if h.id in (h.hooks_dict_ref() or ()))
        self._handles = (*live, handle)
        return handle


class Conv2d(Observed, nn.Conv2d):
    """PyTorch's convolution, with the same arguments, since PEFT builds more of them."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C', H', W']."""
        if self.kernel_size == (1, 1) and _keeps_size(self) and kernels.path(x, self.weight) == "triton":
            # a linear layer over channels_last memory: cuBLAS adds the bias in the product, cuDNN in another pass
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
        return super().forward(x)


class SiLU(Observed, nn.SiLU):
    """Activation of the paper."""


class GELU(Observed, nn.GELU):
    """Activation of the comparison in Sec. 4.4."""


class Dropout2d(Observed, nn.Dropout2d):
    """Dropout of whole channels."""
