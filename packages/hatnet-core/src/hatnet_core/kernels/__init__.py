"""Fast paths of the model: which one runs for which input, and the one switch that chooses (:func:`set_kernels`).

``reference.py`` holds the attention as the equations read, ``mlp.py`` the MLP in slices for CPUs, ``triton_*.py`` the
kernels for GPUs. Nothing here changes a number beyond rounding. Fast paths are skipped while a model is traced or
exported, under ``torch.func`` and dispatch or function modes, and for a layer that has hooks or was replaced.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import chain
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._device import DeviceContext

from hatnet_core.config import KERNELS
from hatnet_core.kernels import mlp, reference

PART_POSITIONS = 6272
"""Of as many positions of a stage's input, two images of 224×224 at stage 2, the maps of a block fit the cache."""

DTYPES = {"slices": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}
"""What each fast path computes in."""

_mode = "auto"

_usable: dict[torch.device, bool] = {}
"""Devices asked for so far, and whether the Triton kernels run on them."""


def set_kernels(name: str) -> None:
    """Choose how all models of this process compute.

    Args:
        name: one of

            - ``auto``, the default: fast paths for the device and the dtype, PyTorch's layers elsewhere.
            - ``plain``: PyTorch's layers and its fused attention, in the layout of the input.
            - ``reference``: the equations as they read, in NCHW, with the attention weights as a tensor. Only here do
              second and forward-mode derivatives exist.
            - ``triton``: ``auto``, and an error if the Triton kernels cannot run. With TRITON_INTERPRET=1 in the
              environment they also run on a CPU, in Triton's interpreter.

    Raises:
        ValueError: if ``name`` is none of these.
        RuntimeError: if it is ``triton``, and Triton or a GPU that it needs is missing.
    """
    global _mode
    if name not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(map(repr, KERNELS))}, got {name!r}")
    if name == "triton":
        if find_spec("triton") is None:
            raise RuntimeError("kernels 'triton' need the package triton, which is not installed; expected 'auto'")
        gpus = (torch.device("cuda", i) for i in range(torch.cuda.device_count()))
        if not _interpreted() and not any(map(_runs_on, gpus)):
            raise RuntimeError(
                "kernels 'triton' need a CUDA GPU of compute capability 8.0 or TRITON_INTERPRET=1 in the environment; "
                "expected 'auto'"
            )
    _mode = name


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d)V (Eq. 2), PyTorch's fused one or that of ``reference.py``; arguments as there."""
    if _mode == "reference":
        return reference.attend(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.fx.wrap
def laid_out(x: Tensor) -> Tensor:
    """``x`` [B, C, H, W] in the memory layout of the chosen kernels: channels last where a fast path applies.

    There a 1×1 convolution is one matrix product, and positions are tokens without a copy. The reference is NCHW.
    """
    if torch.compiler.is_exporting():
        return x.clone(memory_format=torch.contiguous_format)  # whether one is needed would bind a program to a size
    if _mode == "reference":
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last) if _path(x) else x


@torch.fx.wrap
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_float32: bool = False) -> Tensor:
    """GroupNorm with one group of ``x`` [B, C, H, W], in the dtype of ``x``.

    Under autocast PyTorch's result is float32. The Triton kernel's has the dtype of autocast, which the next matrix
    product needs anyway, unless ``keep_float32``, as the residual stream requires.
    """
    if _path(x) == "triton" and _is_plain(weight) and _is_plain(bias):
        from hatnet_core.kernels import triton_group_norm

        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.float32 if keep_float32 else torch.get_autocast_dtype(x.device.type)
        return triton_group_norm.group_norm(x, weight, bias, eps, dtype)
    return F.group_norm(x, 1, weight, bias, eps)


def pointwise(convolution: nn.Module, x: Tensor) -> Tensor:
    """``convolution(x)``, a 1×1 convolution of ``x`` [B, C, H, W].

    On a GPU it is a linear layer over channels_last memory: cuBLAS adds the bias in the product, where cuDNN's
    convolution is followed by another pass over the map. A layer with hooks, or of another kind, is called unchanged.
    """
    if _path(x) == "triton" and _is_pointwise(convolution):
        y = F.linear(x.permute(0, 2, 3, 1), convolution.weight.flatten(1), convolution.bias)
        return y.permute(0, 3, 1, 2)
    return convolution(x)


def by_images(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``forward(x)``, on a CPU some images at a time, whose maps stay in the processor's cache from layer to layer.

    Samples have nothing to do with one another in evaluation mode. Not while gradients are kept, nor where somebody
    would see a layer of ``module`` called several times: one with a hook, a replaced or a patched one.

    Args:
        module: whose layers ``forward`` calls.
        forward: [B, C, H, W] → [B, C', H', W'].
        x: [B, C, H, W].
    """
    if _path(x) != "slices" or torch.compiler.is_compiling() or module.training:
        return forward(x)
    images = max(1, PART_POSITIONS // (x.shape[2] * x.shape[3]))
    if images >= len(x) or _keeps_gradients(chain([x], module.parameters())) or not all(map(_own, module.modules())):
        return forward(x)
    return torch.cat([forward(part) for part in torch.split(x, images)])


def adds_residuals(x: Tensor) -> bool:
    """Return whether the attention kernels run on ``x``; they add a residual where they write their result."""
    return _path(x) == "triton"


def grid_attention(qkv: Tensor, num_heads: int, grid_size: int, residual: Tensor | None) -> Tensor | None:
    """Eq. 6-9 without a copy into grids; None where that does not apply. Arguments as in ``attention.py``."""
    if _path(qkv) != "triton":
        return None
    from hatnet_core.kernels import triton_attention

    if not triton_attention.takes(qkv, num_heads, grid_size):
        return None
    return triton_attention.grid_attention(qkv, num_heads, grid_size, residual)


def token_attention(num_heads: int, maps: tuple[Tensor, ...], residual: Tensor | None) -> Tensor | None:
    """Eq. 11-14 for few keys; None where that does not apply. Arguments as in ``attention.py``."""
    if _path(maps[0]) != "triton":
        return None
    from hatnet_core.kernels import triton_attention

    if len(maps) == 1:  # all positions of one map: a single grid
        side = max(maps[0].shape[2:])
        small = maps[0].shape[2] * maps[0].shape[3] <= triton_attention.POOLED_POSITIONS
        return grid_attention(maps[0], num_heads, side, residual) if small else None
    q, kv = maps
    if not triton_attention.takes_pooled(q, kv, num_heads):
        return None
    return triton_attention.pooled_attention(q, kv, num_heads, residual)


def average_pool(x: Tensor, pool_size: int) -> Tensor | None:
    """Pooling of Eq. 10; None where the kernel does not apply."""
    if _path(x) != "triton":
        return None
    from hatnet_core.kernels import triton_pool

    return triton_pool.average_pool(x, pool_size)


@torch.fx.wrap
def inverted_residual(
    x: Tensor,
    expand: nn.Module,
    act1: nn.Module,
    depthwise: nn.Module | None,
    act2: nn.Module,
    dropout: nn.Module,
    project: nn.Module,
) -> Tensor:
    """Expand → activation → depthwise → activation → dropout → project, layer by layer where no fast path applies.

    Args:
        x: [B, C, H, W].
        expand: 1×1 convolution, C to E·C channels.
        act1: SiLU or GELU.
        depthwise: K×K convolution of E·C channels; without it, ``act2`` is skipped, too.
        act2: SiLU or GELU.
        dropout: before the projection.
        project: 1×1 convolution, E·C to C channels.

    Returns:
        [B, C, H, W], the dtype of ``x``, under autocast that of autocast.
    """
    path, name = _path(x), _activation_name(act1)
    if path and name and name == _activation_name(act2) and _is_depthwise(depthwise) and _keeps_all(dropout):
        if path == "slices" and _is_unbiased_pointwise(expand) and _is_unbiased_pointwise(project):
            weights = _common_dtype(x, expand.weight, depthwise.weight, project.weight)
            if weights is not None:
                return _in_slices(name, *weights)
        if path == "triton" and name == "silu":
            from hatnet_core.kernels import triton_depthwise

            hidden, weight = pointwise(expand, x), depthwise.weight
            if torch.is_autocast_enabled(x.device.type):
                weight = weight.to(hidden.dtype)
            return pointwise(project, triton_depthwise.activated_depthwise(hidden, weight))
    x = act1(expand(x))
    if depthwise is not None:
        x = act2(depthwise(x))
    return project(dropout(x))


def _in_slices(activation: str, x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and not _keeps_gradients([x, expand, depthwise, project]):
        return mlp.inverted_residual(x, expand, depthwise, project, activation)
    from hatnet_core.kernels import mlp_operator  # see there

    return mlp_operator.inverted_residual(x, expand, depthwise, project, activation)


def _path(x: Tensor) -> str:
    """The fast path for ``x``: ``slices``, ``triton``, or nothing.

    Triton's modules are imported where it is chosen, by statements that compilers follow; Triton may not be there.
    """
    if _mode in ("reference", "plain") or torch.compiler.is_exporting() or torch._C._get_tracing_state():
        return ""
    if not _is_plain(x) or _is_watched():
        return ""
    if x.device.type == "cuda":
        path = "triton" if _runs_on(x.device) else ""
    else:
        path = ("triton" if _mode == "triton" and _interpreted() else "slices") if x.device.type == "cpu" else ""
    return path if x.dtype in DTYPES.get(path, ()) else ""


def _is_plain(x: Tensor) -> bool:
    """Not a kind of tensor of its own, a node of torch.fx, or one that torch.func watches."""
    if type(x) not in (Tensor, nn.Parameter):
        return False
    return torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _is_watched() -> bool:
    """A transform of torch.func, or a mode other than that of a default device, sees or replaces every operation.

    Parameters may then be of a kind of their own, even where ``x`` is not. torch has no public names for these.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return True
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def _keeps_gradients(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _common_dtype(x: Tensor, *weights: Tensor) -> list[Tensor] | None:
    """All in one dtype, under autocast its own; None where the weights have another than ``x``, which is an error."""
    if torch.is_autocast_enabled("cpu"):
        return [t.to(torch.get_autocast_dtype("cpu")) for t in (x, *weights)]
    return [x, *weights] if all(w.dtype == x.dtype for w in weights) else None


def _activation_name(module: nn.Module) -> str:
    """What the fast paths call an activation; empty where they do not know it."""
    if not _own(module):
        return ""
    exact_gelu = type(module) is nn.GELU and module.approximate == "none"
    return "silu" if type(module) is nn.SiLU else "gelu" * exact_gelu


def _keeps_all(dropout: nn.Module) -> bool:
    """Whether it is a dropout, or the identity, that changes nothing now."""
    if not isinstance(dropout, (nn.Dropout, nn.Dropout2d)):
        return type(dropout) is nn.Identity and _own(dropout)
    return _own(dropout) and (not dropout.training or dropout.p == 0)


def _is_unbiased_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return _is_pointwise(module) and module.bias is None


def _is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return _is_convolution(module) and module.kernel_size == (1, 1) and module.groups == 1


def _is_depthwise(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    if module is None or not _is_convolution(module) or module.kernel_size[0] != module.kernel_size[1]:
        return False
    odd, unbiased = module.kernel_size[0] % 2 == 1, module.bias is None
    return odd and unbiased and module.groups == module.in_channels == module.out_channels


def _is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether calling a module is a convolution of stride 1 that keeps the size, and nothing else."""
    if type(module) is not nn.Conv2d or not _own(module) or not _is_plain(module.weight):
        return False
    settings = module.stride, module.dilation, module.padding_mode, module.padding
    return settings == ((1, 1), (1, 1), "zeros", tuple(k // 2 for k in module.kernel_size))


def _own(module: nn.Module) -> bool:
    """Whether calling a module does what a class of torch or of this package does, and nobody listens."""
    if "forward" in vars(module) or not type(module).__module__.startswith(("torch.nn.", "hatnet_core.")):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not _global_hooks()


def _global_hooks() -> bool:
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]  # of torch


def _interpreted() -> bool:
    """Whether Triton's kernels run on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


def _runs_on(device: torch.device) -> bool:
    """Return whether the Triton kernels run on a GPU: one of NVIDIA's since Ampere, with a C compiler for Triton.

    Only the driver is tried, which takes no tensor: this also runs while a compiler traces.
    """
    if device not in _usable:
        _usable[device] = False
        if find_spec("triton") and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
            try:
                from triton.runtime import driver  # type: ignore[import-untyped]  # Triton has no types

                driver.active.get_current_target()
                _usable[device] = True
            except Exception as error:  # of a driver or compiler, whatever they raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                warnings.warn(f"HAT-Net runs without its Triton kernels on {device}: {reason}", stacklevel=2)
    return _usable[device]


_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what Dynamo looks for
"""What ``torch.compiler.assume_constant_result`` does, which itself imports the compiler: a second of every start."""
