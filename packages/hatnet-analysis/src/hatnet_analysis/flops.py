"""Parameters and FLOPs of a built model, in the two conventions that Table 2 has to be read with.

One multiply-add is one FLOP in both:

- ``paper``: convolutions, linear layers and normalisations (5 a value, as fvcore counts them), and what fvcore counts
  of resampling and adaptive pooling. For HAT-Net this is what Table 2 states.
- ``complete``: these and every product of two activations, which in these models are the two matrix products of the
  attention. A counter does not see them when they run inside one fused operator; here it does.

The closed forms of the attention alone (Eq. 5 and 15) are in ``complexity.py``; models by name in ``models.py``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from hatnet_core.model import MIN_SIZE

ACTIVATION_PRODUCTS = ("attention", "matmul", "mm", "bmm", "baddbmm", "einsum")
"""Operators whose two factors are activations, as a rule: convolutions and linear layers have operators of their own.
Only ``complete`` counts them; a product with a weight that a model writes as one of these counts as such, too."""

MULTIPLIES = re.compile(
    r"mm|addmm|bmm|baddbmm|addbmm|matmul|mv|addmv|dot|vdot|inner|outer|ger|addr|einsum|tensordot|kron|cdist"
    r"|linear|bilinear|conv\w*|attention|lstm|gru|rnn|linalg|fft|addmm_|baddbmm_"
)
"""A word of the name of an operator that multiplies; without a handle such an operator is refused."""

OPAQUE_WITHOUT_PRODUCTS = frozenset(
    {
        "prim::PythonOp.RoIAlignFunction",  # interpolates
        "prim::PythonOp.NMSop",
        "torchvision::nms",
        "torchvision::roi_align",
    }
)
"""Operators from outside PyTorch that are known to hold no product; any other one is refused."""

CONTAINERS = ("stages", "layers", "blocks")
"""Names of children that stand for the modules in them."""


@dataclass(frozen=True)
class Count:
    """FLOPs of the whole model or a part of it for one image, in both conventions.

    Attributes:
        paper: convolutions, linear layers and normalisations.
        complete: these and the products of activations, those of the attention.
    """

    paper: int
    complete: int


@dataclass(frozen=True)
class Flops:
    """What :func:`count_flops` returns.

    Attributes:
        total: the whole model.
        stages: its parts in order, of HAT-Net ``stem``, ``stages.0`` to ``stages.3`` and ``head``. They add up to
            ``total``, but for what a model computes outside all of its modules.
        blocks: the parts of these, such as ``stages.0.blocks.1``.
        operators: by the operator's name, such as ``conv``, ``group_norm`` and ``attention``.
    """

    total: Count
    stages: dict[str, Count]
    blocks: dict[str, Count]
    operators: dict[str, Count]


def count_params(model: nn.Module) -> int:
    """Number of parameters, trainable or not; a shared one counts once."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, height: int, width: int) -> Flops:
    """Count the FLOPs of one image by running ``model`` on it, in evaluation mode.

    Where G1 does not divide a feature map of HAT-Net, the completed positions of the last grids are computed and
    therefore counted.

    Args:
        model: takes a batch of images [1, in_chans, H, W], on any device but meta; its training modes are left as
            they were. A model without ``in_chans`` is taken to want 3 channels.
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
    analysis = trace(model, example_image(model, height, width))
    stages = stage_names(model)
    operators = analysis.by_operator()
    return Flops(
        _count(operators),
        {name: _count(analysis.by_operator(name)) for name in stages},
        {name: _count(analysis.by_operator(name)) for name in block_names(model)},
        {name: _count(Counter({name: value})) for name, value in operators.items()},
    )


def example_image(model: nn.Module, height: int, width: int, batch: int = 1) -> Tensor:
    """Zeros [batch, in_chans, H, W] of the dtype and on the device of the model's first parameter."""
    weight = next(model.parameters())
    in_chans = getattr(model, "in_chans", 3)
    return torch.zeros(batch, in_chans, height, width, device=weight.device, dtype=weight.dtype)


def trace(module: nn.Module, x: Tensor) -> FlopCountAnalysis:
    """Run ``module`` on ``x`` in evaluation mode and count each operator, products of the attention included.

    Returns:
        fvcore's analysis, with the products of every ``scaled_dot_product_attention`` under ``attention``.

    Raises:
        ValueError: if an operator may hold products and fvcore has no count of it.
    """
    analysis = FlopCountAnalysis(module, x)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_products)
    analysis.set_op_handle("aten::baddbmm", _baddbmm_products)
    analysis.set_op_handle("aten::einsum", _einsum_products)
    # unsupported operators are an error below; uncalled are stochastic depth and identities, which compute nothing
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # checks of the input shape become constants of the trace, which is of one shape
    analysis.tracer_warnings("no_tracer_warning")
    with torch.no_grad(), _evaluation(module), _without_fused_encoder():
        analysis.total()  # runs the module; later questions are answered from this run
    unknown = sorted(name for name in analysis.unsupported_ops() if _may_multiply(name))
    if unknown:
        raise ValueError(
            f"cannot count {', '.join(unknown)}: expected operators that fvcore counts, "
            "scaled_dot_product_attention, or operators without products"
        )
    return analysis


def stage_names(model: nn.Module) -> list[str]:
    """Names of the parts of a model that compute, one level down.

    The children of the model, in their order, with :data:`CONTAINERS` replaced by what they hold; of a model that
    only wraps another one, those of the inner one. Parts without parameters are left out.
    """
    prefix, module = "", model
    while len(children := list(module.named_children())) == 1 and children[0][0] not in CONTAINERS:
        prefix, module = f"{prefix}{children[0][0]}.", children[0][1]
    return [prefix + name for name in _parts(module)]


def block_names(model: nn.Module) -> list[str]:
    """Names of the parts of the parts that :func:`stage_names` gives; one without parts stands for itself."""
    names = []
    for stage in stage_names(model):
        names += [f"{stage}.{name}" for name in _parts(model.get_submodule(stage))] or [stage]
    return names


def _parts(module: nn.Module) -> list[str]:
    names = []
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        if name in CONTAINERS:
            names += [f"{name}.{inner}" for inner, _ in child.named_children()]
        else:
            names.append(name)
    return names


def _count(operators: Counter[str]) -> Count:
    complete = int(sum(operators.values()))
    return Count(paper=complete - int(sum(operators[name] for name in ACTIVATION_PRODUCTS)), complete=complete)


def _may_multiply(operator: str) -> bool:
    """Whether an operator without a handle has to be refused; torchvision's or one's own is, unless it is known."""
    namespace, _, name = operator.partition("::")
    if namespace != "aten":
        return operator not in OPAQUE_WITHOUT_PRODUCTS
    return any(MULTIPLIES.fullmatch(word) for word in name.split("_"))


def _attention_products(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Q·Kᵀ and its product with V, of queries [..., n, d], keys [..., m, d] and values [..., m, e]."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    scores = math.prod(q[:-1]) * k[-2]
    return Counter({"attention": scores * q[-1] + scores * v[-1]})


def _baddbmm_products(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """The product of [b, n, d] and [b, d, m], which is added to a mask."""
    a, b = (value.type().sizes() for value in inputs[1:3])
    return Counter({"baddbmm": math.prod(a) * b[-1]})


def _einsum_products(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """One multiply-add for each combination of indices; fvcore reads four digits off NumPy's estimate."""
    equation, operands = inputs[0].toIValue(), list(inputs[1].node().inputs())
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        shape = operand.type().sizes()
        if "." in letters or len(operands) != 2:
            raise ValueError(f"cannot count einsum {equation!r}: expected two operands without ellipses")
        for letter, side in zip(letters, shape, strict=True):
            sizes[letter] = max(side, sizes.get(letter, 1))  # a side of 1 is repeated
    return Counter({"einsum": math.prod(sizes.values())})


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


@contextmanager
def _without_fused_encoder() -> Iterator[None]:
    """Torch's multi-head attention as its single products, not as the one operator it has for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
