"""Register a kernel and its gradient with PyTorch, and call them directly in eager mode.

A call through ``torch.library.custom_op`` costs the host several times the launch of the kernel. Eager mode therefore
calls the launcher, inside an ``autograd.Function`` if gradients are needed. Compilers, which have to see an operator,
get the registered one.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    keep: Callable[[Any, tuple[Any, ...], Any], None],
    gradients: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """Return a function that computes ``forward`` and can be differentiated once.

    Args:
        name: the operators are ``hatnet::NAME`` and ``hatnet::NAME_backward``.
        forward: launches the kernels; annotated, as ``custom_op`` requires.
        backward: launches the kernels of the gradient; annotated.
        fake: shapes of ``forward``'s results.
        fake_backward: shapes of ``backward``'s results.
        keep: what autograd calls after ``forward``, with context, inputs and output.
        gradients: gradients of the inputs from ``backward`` (first argument), context and the output's gradients.
    """
    forward_op = torch.library.custom_op(f"hatnet::{name}", forward, mutates_args=())
    backward_op = torch.library.custom_op(f"hatnet::{name}_backward", backward, mutates_args=())
    forward_op.register_fake(fake)
    backward_op.register_fake(fake_backward)
    forward_op.register_autograd(lambda ctx, *given: gradients(backward_op, ctx, *given), setup_context=keep)

    class Function(torch.autograd.Function):
        """The same without the dispatcher."""

        @staticmethod
        def forward(*arguments: Any) -> Any:
            return forward(*arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            keep(ctx, inputs, output)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *given: Any) -> Any:
            return gradients(backward, ctx, *given)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward_op(*arguments)
        if torch.is_grad_enabled():  # also for forward-mode derivatives, which are refused there
            return Function.apply(*arguments)
        return forward(*arguments)

    return call
