"""The MLP in slices (``mlp.py``) as an operator with a gradient, which compilers keep whole.

A module of its own: registering an operator imports what takes a second, and inference does without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hatnet_core.kernels import mlp

inverted_residual = torch.library.custom_op("hatnet::inverted_residual", mlp.inverted_residual, mutates_args=())
inverted_residual_backward = torch.library.custom_op(
    "hatnet::inverted_residual_backward", mlp.inverted_residual_backward, mutates_args=()
)


@inverted_residual.register_fake
def _(x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


@inverted_residual_backward.register_fake
def _(
    gradient: Tensor, x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    return of_x, torch.empty_like(expand), torch.empty_like(depthwise), torch.empty_like(project)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.activation = inputs[4]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*inverted_residual_backward(gradient, *ctx.saved_tensors, ctx.activation), None)


inverted_residual.register_autograd(_backward, setup_context=_keep)
