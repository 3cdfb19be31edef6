"""Fast paths of the model: which one runs for which input, and the one switch that chooses (:func:`set_kernels`).

``reference.py`` holds the attention as the equations read, ``mlp.py`` the MLP in slices for CPUs, ``triton_*.py`` the
kernels for GPUs. Nothing here changes a number beyond rounding. Fast paths are left out while a model is traced or
exported, under ``torch.func``, and for a layer that somebody listens to or has replaced.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hatnet_core.kernels import mlp, reference

MODES = ("auto", "reference", "triton")

PART_POSITIONS = 6272
"""Of as many positions of a stage's input, two images of 224×224 at stage 2, the maps of a block fit the cache."""

DTYPES = {"slices": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}
"""What each fast path computes in."""

_mode = "auto"

_usable: dict[torch.device, bool] = {}
"""Whether the Triton kernels run on a device, once tried."""


def set_kernels(name: str) -> None:
    """Choose how all models of this process compute.

    Args:
        name: ``auto`` picks by device, data type and circumstances, falls back where something does not run, and is
            never wrong to leave as it is. ``reference`` computes as plainly as the equations read, in NCHW with the
            attention weights as a tensor, to compare with; it alone has forward-mode derivatives. ``triton`` is
            ``auto`` that does not fall back on a GPU where the Triton kernels fail.

    Raises:
        ValueError: if ``name`` is another.
        RuntimeError: if it is ``triton``, and Triton is not installed or there is nothing it runs on.
    """
    global _mode
    if name not in MODES:
        raise ValueError(f"kernels must be one of {', '.join(map(repr, MODES))}, got {name!r}")
    if name == "triton" and find_spec("triton") is None:
        raise RuntimeError("kernels 'triton' need the package triton, which is not installed; expected 'auto'")
    if name == "triton" and not (torch.cuda.is_available() or _interpreted()):
        raise RuntimeError(
            "kernels 'triton' need a CUDA GPU, or TRITON_INTERPRET=1 in the environment; expected 'auto'"
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
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm with one group of ``x`` [B, C, H, W]; the dtype of ``x``, also under autocast where Triton runs."""
    if _path(x) == "triton":
        from hatnet_core.kernels import triton_group_norm

        return triton_group_norm.group_norm(x, weight, bias, eps)
    return F.group_norm(x, 1, weight, bias, eps)


def by_images(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``forward(x)``, on a CPU some images at a time, whose maps stay in the processor's cache from layer to layer.

    Samples have nothing to do with one another in evaluation mode. Not while gradients are kept, nor where somebody
    listens to a layer of ``module`` and would see it called several times.

    Args:
        module: whose layers ``forward`` calls.
        forward: [B, C, H, W] → [B, C', H', W'].
        x: [B, C, H, W].
    """
    if _path(x) != "slices" or torch.compiler.is_compiling() or torch.is_grad_enabled() or module.training:
        return forward(x)
    images = max(1, PART_POSITIONS // (x.shape[2] * x.shape[3]))
    if images >= len(x) or _global_hooks() or any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
        return forward(x)
    return torch.cat([forward(part) for part in torch.split(x, images)])


def grid_attention(qkv: Tensor, num_heads: int, grid_size: int) -> Tensor | None:
    """Eq. 6-8 without a copy into grids; None where that does not apply. Arguments as in ``attention.py``."""
    if _path(qkv) != "triton":
        return None
    from hatnet_core.kernels import triton_window

    takes = triton_window.takes(qkv, num_heads, grid_size)
    return triton_window.grid_attention(qkv, num_heads, grid_size) if takes else None


@torch.fx.wrap
def inverted_residual(x: Tensor, layers: Sequence[nn.Conv2d], activation: nn.Module) -> Tensor | None:
    """The convolutions ``layers`` with ``activation`` between them; None where no fast path applies.

    Args:
        x: [B, C, H, W].
        layers: expansion, depthwise convolution and projection.
        activation: behind the first and the second.

    Returns:
        [B, C, H, W] in channels_last, the dtype of ``x``, under autocast that of autocast.
    """
    path, name = _path(x), {nn.SiLU: "silu", nn.GELU: "gelu"}.get(type(activation))
    expand, depthwise, project = layers
    if path == "slices" and name is not None and all(_bare(layer) for layer in (*layers, activation)):
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        x, weights = x.to(dtype), [layer.weight.to(dtype) for layer in layers]
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            return mlp.inverted_residual(x, weights[0], weights[1], weights[2], name)
        from hatnet_core.kernels import mlp_operator  # see there

        return mlp_operator.inverted_residual(x, *weights, name)
    if path == "triton" and name == "silu" and _bare(depthwise) and _bare(activation):
        from hatnet_core.kernels import triton_depthwise

        hidden = expand(x)
        return project(triton_depthwise.activated_depthwise(hidden, depthwise.weight.to(hidden.dtype)))
    return None


def _path(x: Tensor) -> str:
    """The fast path for ``x``: ``slices``, ``triton``, or nothing.

    Triton's modules are imported where it is chosen, by statements that compilers follow; Triton may not be there.
    """
    if _mode == "reference" or torch.compiler.is_exporting() or torch._C._get_tracing_state():
        return ""
    if type(x) not in (Tensor, nn.Parameter):  # a kind of tensor of its own, or a node of torch.fx
        return ""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return ""
    if x.device.type == "cuda":
        path = "triton" if _runs_on(x.device) else ""
    else:
        path = ("triton" if _mode == "triton" and _interpreted() else "slices") if x.device.type == "cpu" else ""
    return path if x.dtype in DTYPES.get(path, ()) else ""


def _bare(module: nn.Module) -> bool:
    """Whether calling a module does what its class does with its own weights, and nobody listens."""
    if type(module) not in (nn.Conv2d, nn.SiLU, nn.GELU) or "forward" in vars(module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and not _global_hooks()


def _global_hooks() -> bool:
    return bool(torch.nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def _interpreted() -> bool:
    """Whether Triton's kernels run on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


def _runs_on(device: torch.device) -> bool:
    """Whether the Triton kernels run on a GPU: tried once, with a small map; a warning tells why not."""
    if device not in _usable:
        try:
            _try_all(device)
            _usable[device] = True
        except Exception as error:
            if _mode == "triton":
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            warnings.warn(f"HAT-Net runs without its Triton kernels on {device}: {reason}", stacklevel=2)
            _usable[device] = False
    return _usable[device]


_runs_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
"""What ``torch.compiler.assume_constant_result`` does, which itself imports the compiler: a second of every start."""


@torch.no_grad()
def _try_all(device: torch.device) -> None:
    from hatnet_core.kernels import triton_depthwise, triton_group_norm, triton_window

    x = torch.zeros(1, 64, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    triton_group_norm.group_norm(x, x[0, :, 0, 0], x[0, :, 0, 0], 1e-6)
    triton_window.grid_attention(x.repeat(1, 3, 1, 1), 1, 8)
    triton_depthwise.activated_depthwise(x, x.new_zeros(64, 1, 3, 3))
