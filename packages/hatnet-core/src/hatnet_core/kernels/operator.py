"""Registration of kernels as PyTorch operators, and helpers for memory layout and block sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Keep = Callable[[Any, tuple[Any, ...], Any], None]
"""Called by autograd after the forward pass, with context, inputs and output: saves what the backward pass needs."""

Gradients = Callable[..., tuple[Tensor | None, ...]]
"""Gradients of the inputs, from the backward operator, the context and the gradients of the output."""


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    keep: Keep,
    gradients: Gradients,
    flops: tuple[Callable[..., int], Callable[..., int]] | None = None,
) -> Callable[..., Any]:
    """Register ``forward`` as an operator with a gradient, and return the operator.

    It can be differentiated once. :func:`hatnet_core.kernels.path` keeps it from ``torch.func``.
    ``torch.library.custom_op`` does the same, but imports the compiler's symbolic shapes and costs twice the time per
    call.

    Args:
        name: the operators are ``hatnet::NAME`` and ``hatnet::NAME_backward``.
        forward: computes the result; annotated, since the operator's schema is read from it.
        backward: computes the gradients; annotated.
        fake: shapes of the results of ``forward``.
        fake_backward: shapes of the results of ``backward``.
        keep: see :data:`Keep`.
        gradients: see :data:`Gradients`.
        flops: FLOPs of ``forward`` and ``backward``, two for a multiply-add, from their arguments with shapes in the
            place of tensors; for PyTorch's ``FlopCounterMode``.
    """
    operator = _define(name, forward, fake)
    backward_operator = _define(f"{name}_backward", backward, fake_backward)
    torch.library.register_autograd(
        f"hatnet::{name}", lambda ctx, *given: gradients(backward_operator, ctx, *given), setup_context=keep
    )
    torch.library.register_autograd(f"hatnet::{name}_backward", _refuse_second_derivative)
    if flops is not None:
        _count_flops(name, flops[0])
        _count_flops(f"{name}_backward", flops[1])
    return operator


def _count_flops(name: str, flops: Callable[..., int]) -> None:
    from torch.utils.flop_counter import register_flop_formula  # imports Triton where it is installed

    def formula(*arguments: Any, out_shape: Any = None, **_: Any) -> int:
        return flops(*arguments)

    register_flop_formula(getattr(torch.ops.hatnet, name))(formula)


def _refuse_second_derivative(ctx: Any, *given: Tensor) -> None:
    raise RuntimeError("kernels can be differentiated once; set_kernels('reference') has all derivatives")


def _define(name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(f"hatnet::{name}", schema)
    torch.library.impl(f"hatnet::{name}", ("cpu", "cuda"), function)
    torch.library.register_fake(f"hatnet::{name}", fake)
    operator: Callable[..., Any] = getattr(torch.ops.hatnet, name).default
    return operator


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H, W, C], contiguous; a view if ``x`` is in channels_last."""
    return x.permute(0, 2, 3, 1).contiguous()


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of ``x`` the current one, which Triton launches on."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def ceil_div(a: int, b: int) -> int:
    """Return ⌈a/b⌉; ``triton.cdiv`` costs a microsecond per call."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two of at least ``n``."""
    return 1 << (n - 1).bit_length()
