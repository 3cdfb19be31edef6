"""Choose what computes the model: :func:`set_kernels` sets the mode, :func:`path` answers for given tensors.

Both branches are visible where they are taken, in ``attention.py`` and ``layers.py``; they differ by rounding only.
Layers stay modules that can be called, hooked, wrapped and replaced: only ``layers.Mlp`` computes with the weights of
its layers instead of calling them, and it asks ``stock.is_stock`` first.
"""

from __future__ import annotations

import os
import warnings
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from hatnet_core.config import KERNELS

DTYPES = {"slices": (torch.float32, torch.bfloat16), "triton": (torch.float32, torch.bfloat16, torch.float16)}

_mode, _cpu = "auto", "slices"  # what set_kernels chose, and the path that it means on a CPU
_gpus: dict[int, bool] = {}  # whether Triton's kernels run, by index of the GPU


def set_kernels(name: str) -> None:
    """Choose how all models of this process compute.

    Args:
        name: one of

            - ``auto``, the default: kernels for the device and the dtype, PyTorch's layers elsewhere.
            - ``plain``: PyTorch's layers and its fused attention, in the layout of the input.
            - ``reference``: the equations as they read, in NCHW, with the attention weights as a tensor. Second and
              forward-mode derivatives exist in this mode only.
            - ``triton``: ``auto``, and an error if the Triton kernels cannot run. With TRITON_INTERPRET=1 in the
              environment they also run on a CPU, in Triton's interpreter.

    Raises:
        ValueError: if ``name`` is none of these.
        RuntimeError: if it is ``triton``, and Triton or a suitable GPU is missing.
    """
    global _mode, _cpu
    if name not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(map(repr, KERNELS))}, got {name!r}")
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if name == "triton" and find_spec("triton") is None:
        raise RuntimeError("kernels 'triton' need the package triton, which is not installed")
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if name == "triton" else []
    if name == "triton" and not interpreted and not any(map(runs_triton, gpus)):
        raise RuntimeError("kernels 'triton' need a CUDA GPU of capability 8.0, or TRITON_INTERPRET=1")
    _mode, _cpu = name, "triton" if interpreted else "slices"


def mode() -> str:
    """Return the mode that :func:`set_kernels` chose."""
    return _mode


def path(*tensors: Tensor) -> str:
    """Return what computes with these tensors: ``slices``, ``triton``, or an empty string for PyTorch's layers.

    The first one decides by device and dtype. Tensors of another class take PyTorch's layers (DTensor, quantised and
    fake ones, proxies of ``torch.fx``), and so do those that :func:`is_mapped` finds.
    """
    if _mode in ("plain", "reference") or any(type(t) not in (Tensor, nn.Parameter) or is_mapped(t) for t in tensors):
        return ""
    # an exported or traced file has to run without kernels
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return ""
    device = tensors[0].device
    found = _cpu if device.type == "cpu" else "triton" if runs_triton(device) else ""
    return found if tensors[0].dtype in DTYPES.get(found, ()) else ""


def is_mapped(x: Tensor) -> bool:
    """Return whether torch.func maps over ``x`` or differentiates by it, which takes PyTorch's layers."""
    try:
        return not torch.compiler.is_compiling() and x.untyped_storage() is None
    except NotImplementedError:  # torch.func wraps a tensor in one without storage
        return True


def runs_triton(device: torch.device) -> bool:
    """Return whether the Triton kernels run on a GPU: NVIDIA's since Ampere, with a C compiler for Triton.

    Tried once, when a model is built on the GPU or moved to it, or at the first eager use. A compiler cannot trace it.
    """
    index = device.index or 0
    if index not in _gpus and device.type == "cuda" and not torch.compiler.is_compiling():
        _gpus[index] = False
        if find_spec("triton") and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0):
            try:
                from triton.runtime import driver  # type: ignore[import-untyped]  # Triton has no types

                _gpus[index] = bool(driver.active.get_current_target())
            except Exception as error:  # of a driver or compiler, whatever they raise
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                warnings.warn(f"HAT-Net runs without its Triton kernels on {device}: {reason}", stacklevel=2)
    return device.type == "cuda" and _gpus.get(index, False)
