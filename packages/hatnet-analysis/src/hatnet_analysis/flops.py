"""Parameters and FLOPs of a built HAT-Net, in the two conventions that Table 2 has to be read with.

One multiply-add is one FLOP in both:

- ``paper``: convolutions, linear layers and normalisations (5 a value, as fvcore counts them). This is what
  Table 2 states.
- ``complete``: these and the two matrix products of every attention, which a counter does not see when they run
  inside one fused operator.

The closed forms of the attention alone (Eq. 5 and 15) are in ``complexity.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from hatnet_core import HATNet
from hatnet_core.model import MIN_SIZE

UNCOUNTED_OPS = frozenset(
    {
        "aten::add",
        "aten::avg_pool2d",
        "aten::feature_dropout",
        "aten::gelu",
        "aten::lt",
        "aten::mean",
        "aten::meshgrid",
        "aten::mul",
        "aten::neg",
        "aten::pad",
        "aten::repeat",
        "aten::rsub",
        "aten::silu",
        "aten::sub",
        "aten::where",
    }
)
"""Operators that neither convention counts: elementwise, averaging, or moving data. No matrix product is here."""


@dataclass(frozen=True)
class Count:
    """FLOPs of the whole model or a part of it for one image, in both conventions.

    Attributes:
        paper: convolutions, linear layers and normalisations.
        complete: these and the matrix products of the attention.
    """

    paper: int
    complete: int


@dataclass(frozen=True)
class Flops:
    """What :func:`count_flops` returns.

    Attributes:
        total: the whole model.
        stages: its parts in order, ``stem``, ``stages.0`` to ``stages.3`` and ``head``; they add up to ``total``.
    """

    total: Count
    stages: dict[str, Count]


def count_params(model: nn.Module) -> int:
    """Number of parameters, trainable or not; a shared one counts once."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: HATNet, height: int, width: int) -> Flops:
    """Count the FLOPs of one image by running ``model`` on it, in evaluation mode.

    Where G1 does not divide a feature map, the completed positions of the last grids are computed and therefore
    counted.

    Args:
        model: the model, on any device but meta; its training modes are left as they were.
        height: H of the image in pixels, at least 32.
        width: W, likewise.

    Raises:
        ValueError: if a side is below 32, or the model holds an operator that cannot be counted.

    Example:
        >>> from hatnet_core import create_model
        >>> count_flops(create_model("hatnet_tiny"), 224, 224).total
        Count(paper=1987397504, complete=2145790592)
    """
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"height and width must be at least {MIN_SIZE} pixels, got {height}×{width}")
    weight = next(model.parameters())
    image = torch.zeros(1, model.config["in_chans"], height, width, device=weight.device, dtype=weight.dtype)
    analysis = trace(model, image)
    parts = ["stem", *(f"stages.{i}" for i in range(len(model.stages))), "head"]
    return Flops(_count(analysis, ""), {part: _count(analysis, part) for part in parts})


def trace(module: nn.Module, x: Tensor) -> FlopCountAnalysis:
    """Run ``module`` on ``x`` in evaluation mode and count each operator, attention products included.

    Returns:
        fvcore's analysis, with the attention products of every ``scaled_dot_product_attention`` under
        ``attention``.

    Raises:
        ValueError: if an operator is neither counted nor one of ``UNCOUNTED_OPS``.
    """
    analysis = FlopCountAnalysis(module, x)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_products)
    # unsupported operators are an error below; uncalled are stochastic depth and identities, which compute nothing
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # checks of the input shape become constants of the trace, which is of one shape
    analysis.tracer_warnings("no_tracer_warning")
    with torch.no_grad(), _evaluation(module):
        analysis.total()  # runs the module; later questions are answered from this run
    unknown = sorted(analysis.unsupported_ops().keys() - UNCOUNTED_OPS)
    if unknown:
        raise ValueError(
            f"cannot count {', '.join(unknown)}: expected operators that fvcore counts, "
            "scaled_dot_product_attention, or operators without products"
        )
    return analysis


def _count(analysis: FlopCountAnalysis, part: str) -> Count:
    operators = analysis.by_operator(part)
    complete = int(operators.total())
    return Count(paper=complete - int(operators["attention"]), complete=complete)


def _attention_products(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Q·Kᵀ and its product with V, of queries [..., n, d], keys [..., m, d] and values [..., m, e]."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    scores = math.prod(q[:-1]) * k[-2]
    return Counter({"attention": scores * q[-1] + scores * v[-1]})


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the training mode of every submodule as before outside."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode
