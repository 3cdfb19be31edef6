"""The inner part of the MLP in slices: 1×1 → activation → K×K depthwise → activation → 1×1, the wide map never whole.

The map of E·C channels is most of what the model reads and writes. Here a slice of it, some images and some of its
channels (in float32 alone: others would round the sums), small enough for the processor's cache, goes through all five
steps at a time. The backward pass computes the slices again, so that nothing of the width E·C is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hatnet_core.kernels.layout import to_tokens

SLICE_VALUES = 2**20
"""About as many values of the wide map are worked on at a time: 4 MB in float32."""

MIN_CHANNELS = 64
"""Narrower slices make poor matrix products."""

ACTIVATE = {"silu": torch.ops.aten.silu_, "gelu": torch.ops.aten.gelu_}
DERIVE = {"silu": torch.ops.aten.silu_backward, "gelu": torch.ops.aten.gelu_backward}


def inverted_residual(x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str) -> Tensor:
    """Project(act(Depthwise(act(Expand(x))))), the convolutions without bias (Sec. 3.3).

    Args:
        x: [B, C, H, W]; read in channels_last.
        expand: [E·C, C, 1, 1].
        depthwise: [E·C, 1, K, K], K odd; borders are completed by zeros.
        project: [C, E·C, 1, 1].
        activation: ``silu`` or ``gelu``.

    Returns:
        [B, C, H, W] in channels_last, the dtype of ``x``.
    """
    tokens, out = to_tokens(x), to_tokens(torch.empty_like(x, memory_format=torch.channels_last))
    for images, channels in _slices(x, expand.shape[0]):
        weights = _weights(expand, depthwise, project, channels)
        _forward_slice(tokens[images], *weights, activation, out[images].flatten(0, 2), channels.start > 0)
    return out.permute(0, 3, 1, 2)


def inverted_residual_backward(
    gradient: Tensor, x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``expand``, ``depthwise`` and ``project``, given the ``gradient`` of the output."""
    tokens, x_gradient = to_tokens(x), to_tokens(torch.empty_like(x, memory_format=torch.channels_last))
    given = to_tokens(gradient)
    weights = (expand, depthwise, project)
    precision = torch.promote_types(x.dtype, torch.float32)  # of sums over slices
    totals = [torch.zeros(w.shape, dtype=precision, device=w.device) for w in weights]
    for images, channels in _slices(x, expand.shape[0]):
        sums = _weights(totals[0], totals[1], totals[2], channels)
        found = _backward_slice(
            given[images],
            tokens[images],
            *_weights(*weights, channels),
            activation,
            x_gradient[images],
            channels.start > 0,
        )
        for total, part in zip(sums, found, strict=True):
            total += part
    of_expand, of_depthwise, of_project = (total.to(x.dtype) for total in totals)
    return x_gradient.permute(0, 3, 1, 2), of_expand, of_depthwise, of_project


def _slices(x: Tensor, hidden: int) -> Iterator[tuple[slice, slice]]:
    """Images and wide channels of each slice: whole images while they fit, else one image and some of its channels."""
    positions = x.shape[2] * x.shape[3]
    images = max(1, SLICE_VALUES // (positions * hidden))
    channels = hidden
    if positions * hidden > SLICE_VALUES and x.dtype == torch.float32:  # others would round the sums of slices
        count = -(-positions * hidden // SLICE_VALUES)
        channels = max(MIN_CHANNELS, -(-hidden // count) // 32 * 32)
    for i in range(0, x.shape[0], images):
        for c in range(0, hidden, channels):
            yield slice(i, i + images), slice(c, c + channels)


def _weights(expand: Tensor, depthwise: Tensor, project: Tensor, channels: slice) -> tuple[Tensor, Tensor, Tensor]:
    """What belongs to a slice of the wide channels: [c, C], [c, 1, K, K] and [C, c], views."""
    return expand[channels].flatten(1), depthwise[channels], project[:, channels].flatten(1)


def _forward_slice(
    x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, activation: str, out: Tensor, add: bool
) -> None:
    """Tokens [b, H, W, C] → ``out`` [b·H·W, C], set or added to."""
    act_ = ACTIVATE[activation]
    hidden = act_(x.flatten(0, 2) @ expand.t()).view(*x.shape[:3], -1)
    mixed = act_(_depthwise(hidden, depthwise))
    _product(mixed.flatten(0, 2), project.t(), out, add)


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
    """Set or add to ``x_gradient`` [b, H, W, C]; gradients of the slice of the weights, shaped as they are."""
    act_, derive = ACTIVATE[activation], DERIVE[activation]
    shape, x, gradient = (*x.shape[:3], -1), x.flatten(0, 2), gradient.flatten(0, 2)
    expanded = x @ expand.t()
    hidden = act_(expanded.clone()).view(shape)
    mixed = _depthwise(hidden, depthwise)
    mixed_gradient = derive((gradient @ project).view(shape), mixed)
    of_project = gradient.t() @ act_(mixed).flatten(0, 2)
    hidden_gradient, of_depthwise = _depthwise_backward(mixed_gradient, hidden, depthwise)
    expanded_gradient = derive(hidden_gradient.flatten(0, 2), expanded)
    _product(expanded_gradient, expand, x_gradient.flatten(0, 2), add)
    return expanded_gradient.t() @ x, of_depthwise, of_project


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """``out`` is ``a`` @ ``b``, or this is added to it."""
    if add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """[B, H, W, C] → the same, every channel with its own kernel [1, K, K]."""
    padding = weight.shape[-1] // 2
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=padding, groups=x.shape[3]).permute(0, 2, 3, 1)


def _depthwise_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients [B, H, W, C] of the input and [C, 1, K, K] of the kernels of :func:`_depthwise`."""
    maps, padding = [t.permute(0, 3, 1, 2) for t in (gradient, x)], weight.shape[-1] // 2
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        *maps, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], x.shape[3], [True, True, False]
    )
    return of_x.permute(0, 2, 3, 1), of_weight
