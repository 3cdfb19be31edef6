"""The MLP for CPUs, in slices that fit the cache: 1×1 → activation → K×K depthwise → activation → 1×1.

The map of E·C channels is most of what the model reads and writes, and is never materialised here. A slice of it goes
through all five steps at a time: some images and, in float32, some channels (other dtypes would round the sums over
slices). The backward pass computes the slices again, so that no map of E·C channels is kept.

Eager mode runs ordinary PyTorch operations, which dispatch modes see. A compiler gets one operator,
since it would unroll the loop over slices and bind it to a size.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hatnet_core.kernels.operator import register, to_tokens

SLICE_VALUES = 2**20
"""Values of the wide map in a slice, about: 4 MB in float32."""

MIN_CHANNELS = 64
"""Narrower slices make poor matrix products."""

ACTIVATE = {"silu": torch.ops.aten.silu_, "gelu": torch.ops.aten.gelu_}
DERIVE = {"silu": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}


def inverted_residual(x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str) -> Tensor:
    """Project(act(Depthwise(act(Expand(x))))), the convolutions without bias (Sec. 3.3).

    Args:
        x: [B, C, H, W]; read in channels_last.
        expand: [E·C, C, 1, 1].
        depthwise: [E·C, 1, K, K], K odd; maps are zero-padded.
        project: [C, E·C, 1, 1].
        activation: ``silu`` or ``gelu``.

    Returns:
        [B, C, H, W] in channels_last, the dtype of ``x``, under autocast that of autocast.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, expand, depthwise, project = (t.to(dtype) for t in (x, expand, depthwise, project))
    if torch.compiler.is_compiling():
        out: Tensor = _operator(x, expand, depthwise, project, activation)
    elif torch.is_grad_enabled():
        out = _Function.apply(x, expand, depthwise, project, activation)
    else:
        out = _forward(x, expand, depthwise, project, activation)
    return out


def _forward(x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str) -> Tensor:
    tokens, out = to_tokens(x), to_tokens(torch.empty_like(x, memory_format=torch.channels_last))
    for images in image_slices(x, expand.shape[0]):
        for channels in channel_slices(x, expand.shape[0]):
            weights = _weights(expand, depthwise, project, channels)
            _forward_slice(tokens[images], *weights, activation, out[images], add=channels.start > 0)
    return out.permute(0, 3, 1, 2)


def _backward(
    gradient: Tensor, x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``expand``, ``depthwise`` and ``project``, given the ``gradient`` of the output."""
    tokens, x_gradient = to_tokens(x), to_tokens(torch.empty_like(x, memory_format=torch.channels_last))
    given, weights = to_tokens(gradient), (expand, depthwise, project)
    precision = torch.promote_types(x.dtype, torch.float32)  # of sums over slices
    totals = [torch.zeros(w.shape, dtype=precision, device=w.device) for w in weights]
    for images in image_slices(x, expand.shape[0]):
        for channels in channel_slices(x, expand.shape[0]):
            sums = _weights(totals[0], totals[1], totals[2], channels)
            found = _backward_slice(
                given[images],
                tokens[images],
                *_weights(*weights, channels),
                activation,
                x_gradient[images],
                add=channels.start > 0,
            )
            for total, part in zip(sums, found, strict=True):
                total += part
    of_expand, of_depthwise, of_project = (total.to(x.dtype) for total in totals)
    return x_gradient.permute(0, 3, 1, 2), of_expand, of_depthwise, of_project


def image_slices(x: Tensor, hidden: int) -> Iterator[slice]:
    """Images of [B, C, H, W] that go through together: as many as fit a slice, at least one."""
    images = max(1, SLICE_VALUES // (x.shape[2] * x.shape[3] * hidden))
    for i in range(0, max(1, x.shape[0]), images):
        yield slice(i, i + images)


def channel_slices(x: Tensor, hidden: int) -> Iterator[slice]:
    """Channels of the wide map that go through together: all, or a part where one image does not fit a slice."""
    values = x.shape[2] * x.shape[3] * hidden
    channels = hidden
    if values > SLICE_VALUES and x.dtype == torch.float32:  # other dtypes would round the sums over slices
        count = -(-values // SLICE_VALUES)
        channels = max(MIN_CHANNELS, -(-hidden // count) // 32 * 32)
    for c in range(0, hidden, channels):
        yield slice(c, c + channels)


def _weights(expand: Tensor, depthwise: Tensor, project: Tensor, channels: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Return [c, C], [c, 1, K, K] and [C, c], the weights of a slice of the wide channels; views."""
    return expand[channels].flatten(1), depthwise[channels], project[:, channels].flatten(1)


def _forward_slice(
    x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str, out: Tensor, add: bool
) -> None:
    """Tokens [b, H, W, C] → ``out`` [b, H, W, C], set or added to."""
    activate_ = ACTIVATE[activation]
    hidden = activate_(x.flatten(0, 2) @ expand.t()).view(*x.shape[:3], -1)
    hidden = activate_(_depthwise(hidden, depthwise))
    _product(hidden.flatten(0, 2), project.t(), out.flatten(0, 2), add)


def _backward_slice(
    gradient: Tensor,
    x: Tensor,
    expand: Tensor,
    depthwise: Tensor,
    project: Tensor,
    activation: str,
    x_gradient: Tensor,
    add: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Set or add to ``x_gradient`` [b, H, W, C]; return the gradients of the slice of the three weights."""
    activate_, derive = ACTIVATE[activation], DERIVE[activation]
    shape, x, gradient = (*x.shape[:3], -1), x.flatten(0, 2), gradient.flatten(0, 2)
    expanded = x @ expand.t()
    hidden = activate_(expanded.clone()).view(shape)
    mixed = _depthwise(hidden, depthwise)
    mixed_gradient = derive((gradient @ project).view(shape), mixed)
    of_project = gradient.t() @ activate_(mixed).flatten(0, 2)
    hidden_gradient, of_depthwise = _depthwise_backward(mixed_gradient, hidden, depthwise)
    expanded_gradient = derive(hidden_gradient.flatten(0, 2), expanded)
    _product(expanded_gradient, expand, x_gradient.flatten(0, 2), add)
    return expanded_gradient.t() @ x, of_depthwise, of_project


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Set ``out`` to ``a`` @ ``b``, or add this to it."""
    if add:
        torch.addmm(out, a, b, out=out)  # addmm_ is the same, but FlopCounterMode does not know it
    else:
        torch.mm(a, b, out=out)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """[B, H, W, C] → the same shape, every channel with its own kernel [1, K, K]."""
    padding = weight.shape[-1] // 2
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding, groups=x.shape[3]).permute(0, 2, 3, 1)


def _depthwise_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [B, H, W, C] of the input and [C, 1, K, K] of the kernels of :func:`_depthwise`."""
    maps, padding = [t.permute(0, 3, 1, 2) for t in (gradient, x)], weight.shape[-1] // 2
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        *maps, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], x.shape[3], [True, True, False]
    )
    return of_x.permute(0, 2, 3, 1), of_weight


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.activation = inputs[4]


def _gradients(backward: Callable[..., Any], ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward(gradient, *ctx.saved_tensors, ctx.activation), None)


class _Function(torch.autograd.Function):
    """The slices in eager mode, without the opaque operator."""

    @staticmethod
    def forward(x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str) -> Tensor:
        return _forward(x, expand, depthwise, project, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(_backward, ctx, gradient)


def _fake(x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _fake_backward(
    gradient: Tensor, x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_x = torch.empty_like(x, memory_format=torch.channels_last)
    return of_x, torch.empty_like(expand), torch.empty_like(depthwise), torch.empty_like(project)


_operator = register("inverted_residual", _forward, _backward, _fake, _fake_backward, _keep, _gradients)
