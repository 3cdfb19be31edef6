"""Handles for the FLOP counters of fvcore and MMEngine, which do not count attention, and two conventions.

Both libraries trace a model on one image and ask a handle for the cost of each operator. They know neither the fused
attention nor which products have a weight as a factor. The same handles serve both, so they are in hatnet-core, which
imports neither:

    analysis = FlopCountAnalysis(model, image).set_op_handle(**HANDLES)
    paper, complete = conventions(analysis.by_operator())

One multiply-add is one FLOP. A factor of a matrix product is a weight if it is stored in the model. That of a linear
layer or a convolution is a weight unless it is computed from the image. Elementwise products with a sum, such as
``(a * b).sum()``, are not counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

Handle = Callable[[list[Any], list[Any]], "Counter[str]"]
"""FLOPs by operator name, from the inputs and outputs of an operator, values of the traced graph."""

FIRST_FACTOR = {"matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Operators that are one matrix product, with the index of its first factor among the inputs."""

ACTIVATION_PRODUCTS = ("attention", "einsum", "dynamic_linear", "dynamic_conv", *FIRST_FACTOR)
"""Names under which :data:`HANDLES` count products of two activations.

``dynamic_…`` are layers whose weight is computed from the image. A product with a weight is ``linear`` or ``conv``.
"""

RESHAPED = re.compile(
    r"aten::(t|mT|numpy_T|transpose|permute|view|reshape|flatten|unflatten|expand|squeeze|unsqueeze|select|slice"
    r"|contiguous|clone|detach|to|type_as)"
)
"""Operators that return values of their first input in another shape or dtype."""


def conventions(operators: Counter[str]) -> tuple[int, int]:
    """Sum the FLOPs of all operators in the two conventions.

    Returns:
        ``paper``: without products of two activations, as in Table 2. ``complete``: all.
    """
    complete = int(sum(operators.values()))
    return complete - int(sum(operators[name] for name in ACTIVATION_PRODUCTS)), complete


def _attention(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count Q·Kᵀ and its product with V: queries [..., n, d], keys [..., m, d], values [..., m, e]."""
    q, k, v = (_shape(value) for value in inputs[:3])
    scores = math.prod(q[:-1]) * k[-2]
    return Counter({"attention": scores * q[-1] + scores * v[-1]})


def _matrix_product(name: str, first: int) -> Handle:
    def handle(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        a, b = inputs[first : first + 2]
        return _product(name, [a, b], math.prod(_shape(outputs[0])) * _shape(a)[-1])

    return handle


def _linear(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    x, weight = inputs[:2]
    flops = math.prod(_shape(outputs[0])) * _shape(x)[-1]
    return _layer("linear", flops, _is_stored(x) or not _sees_image(weight))


def _convolution(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    # Each value of the kernel meets every position of the output; of a transposed convolution, of the input.
    x, kernel, transposed = *inputs[:2], inputs[6].toIValue()
    positions = _shape(x if transposed else outputs[0])
    flops = positions[0] * math.prod(positions[2:]) * math.prod(_shape(kernel))
    return _layer("conv", flops, not _sees_image(kernel))


def _einsum(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """Count one multiply-add per combination of indices; the libraries parse four digits of NumPy's estimate."""
    equation, operands = inputs[0].toIValue(), list(inputs[1].node().inputs())
    if len(operands) > 2:
        raise ValueError(f"einsum must have at most two operands, got {equation!r}")
    sides: dict[str, int] = {}
    for term, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=True):
        for index, side in _indices(term, _shape(operand)):
            sides[index] = max(side, sides.get(index, 1))  # a side of 1 is broadcast
    return _product("einsum", operands, math.prod(sides.values()) if len(operands) == 2 else 0)


def _indices(term: str, shape: list[int]) -> list[tuple[str, int]]:
    """Pair the letters of one operand with its sides; number the dimensions of an ellipsis from the right."""
    before, _, after = term.partition("...")
    between = [f"...{i}" for i in range(len(shape) - len(before) - len(after), 0, -1)]
    return list(zip([*before, *between, *after], shape, strict=True))


def _product(name: str, factors: list[Any], flops: int) -> Counter[str]:
    return Counter({"linear" if any(_is_stored(factor) for factor in factors) else name: flops})


def _layer(name: str, flops: int, has_weight: bool) -> Counter[str]:
    return Counter({name if has_weight else f"dynamic_{name}": flops})


def _sees_image(value: Any) -> bool:
    """Return whether a tensor is computed from the pixels of the image; from its size alone does not count."""
    seen, todo = set(), [value]
    while todo:
        node = (value := todo.pop()).node()
        if node.kind() == "prim::Param" and not _is_stored(value):
            return True
        if value.debugName() not in seen and node.kind() not in ("prim::Param", "aten::size"):
            todo += node.inputs()
        seen.add(value.debugName())
    return False


def _is_stored(value: Any) -> bool:
    """Return whether a tensor is stored in the model: a weight, a buffer or a constant."""
    while RESHAPED.fullmatch(value.node().kind()):
        value = next(value.node().inputs())
    if value.node().kind() == "prim::Param":
        # Parameters of the traced graph are the image, then the weights and buffers of the model.
        return value.debugName() != next(value.node().outputs()).debugName()
    return value.node().kind() == "prim::Constant"


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


HANDLES: dict[str, Handle] = {
    "aten::scaled_dot_product_attention": _attention,
    "aten::einsum": _einsum,
    "aten::linear": _linear,
    "aten::_convolution": _convolution,
    **{f"aten::{name}": _matrix_product(name, first) for name, first in FIRST_FACTOR.items()},
}
"""Arguments of ``set_op_handle`` of either library, for a model that takes one tensor."""
