"""Count the parameters and FLOPs of a built model, in two conventions.

One multiply-add is one FLOP in both:

- ``paper``: convolutions, linear layers and normalisations, and what fvcore counts of resampling and adaptive pooling,
  as Table 2 counts HAT-Net. A product with a weight is a linear layer, however a model writes it.
- ``complete``: these and every matrix product and convolution of two activations, in these models the two matrix
  products of the attention, also inside one fused operator.

fvcore counts 5 per value of group, layer and instance norms, and 2 of batch norms with running statistics; one less
each without weights.

The handles of products are in ``hatnet_core.flop_handles``; the closed forms of the attention alone (Eq. 5 and 15) in
``complexity.py``; models by name in ``models.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from hatnet_core.flop_handles import HANDLES, conventions
from hatnet_core.variants import MIN_SIZE

MULTIPLIES = re.compile(
    r"\w*mm|matmul|cosine|mv|addmv|dot|vdot|inner|outer|ger|addr|einsum|tensordot|kron|cdist|pdist|cov|corrcoef"
    r"|(bi|tri)?linear|conv\w*|attention|transformer|lstm|gru|rnn|fft|i?stft"
    r"|linalg|matrix|solve|cholesky|p?inverse|(log|slog)?det|svd|qr|geqrf|orgqr|ormqr"
)
"""Words in the names of operators that multiply; without a handle such an operator is refused."""

WITHOUT_PRODUCTS = frozenset(
    {
        "aten::linalg_vector_norm",
        "prim::PythonOp.RoIAlignFunction",  # interpolates
        "prim::PythonOp.NMSop",
        "torchvision::nms",
        "torchvision::roi_align",
    }
)
"""Operators without products, despite their names or from outside PyTorch."""

CONTAINERS = ("stages", "layers", "blocks")
"""Names of children that are replaced by the modules in them."""


@dataclass(frozen=True)
class Count:
    """FLOPs of a model or a part of it for one image, in both conventions.

    Attributes:
        paper: convolutions, linear layers and normalisations.
        complete: these and the products of activations, as in attention.
    """

    paper: int
    complete: int


@dataclass(frozen=True)
class Flops:
    """FLOPs of a model and its parts.

    Attributes:
        total: the whole model.
        stages: its parts in order, of HAT-Net ``stem``, ``stages.0`` to ``stages.3`` and ``head``. They add up to
            ``total`` without what a model computes outside its modules or in parts without parameters.
        blocks: the parts of these, such as ``stages.0.blocks.1``.
        operators: by the operator's name, such as ``conv``, ``group_norm`` and ``attention``.
    """

    total: Count
    stages: dict[str, Count]
    blocks: dict[str, Count]
    operators: dict[str, Count]


def count_params(model: nn.Module) -> int:
    """Count the parameters, trainable or not; a shared one counts once."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, height: int, width: int) -> Flops:
    """Count the FLOPs of one image by running ``model`` on it, in evaluation mode.

    Where G1 does not divide a feature map of HAT-Net, the padding of the last grids is computed and therefore counted.

    Args:
        model: takes a batch of images [1, in_chans, H, W], 3 channels if it has no ``in_chans``; on any device but
            meta. Its training modes are restored.
        height: H of the image in pixels, at least 32.
        width: W of the image in pixels, at least 32.

    Raises:
        ValueError: if a side is below 32, or an operator of the model cannot be counted.

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
    """Create zeros [batch, in_chans, H, W] of the dtype and on the device of the model's first parameter."""
    weight = next(model.parameters())
    in_chans = getattr(model, "in_chans", 3)
    return torch.zeros(batch, in_chans, height, width, device=weight.device, dtype=weight.dtype)


def trace(module: nn.Module, x: Tensor) -> FlopCountAnalysis:
    """Run ``module`` on ``x`` in evaluation mode and count each operator, products of the attention included.

    Returns:
        fvcore's analysis, with the products of every ``scaled_dot_product_attention`` under ``attention``, and every
        product with a weight under ``conv`` or ``linear``; ``hatnet_core.flop_handles`` lists what is not seen.

    Raises:
        ValueError: if an operator may multiply and has no handle.
    """
    analysis = FlopCountAnalysis(module, x)
    analysis.set_op_handle(**HANDLES)
    # unsupported operators are an error below; uncalled are stochastic depth and identities, which compute nothing
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # checks of the input shape become constants of the trace, which is of one shape
    analysis.tracer_warnings("no_tracer_warning")
    with torch.no_grad(), _evaluation(module), _without_fused_encoder():
        analysis.total()  # runs the module; later questions are answered from this run
    unknown = sorted(name for name in analysis.unsupported_ops() if _may_multiply(name))
    if unknown:
        raise ValueError(
            "operators must be counted by fvcore, be scaled_dot_product_attention or have no products, "
            f"got {', '.join(unknown)}"
        )
    return analysis


def stage_names(model: nn.Module) -> list[str]:
    """List the children of a model in order, with :data:`CONTAINERS` replaced by the modules in them.

    A model that only wraps another one has the children of the inner one. Parts without parameters are omitted.
    """
    prefix, module = "", model
    while len(children := list(module.named_children())) == 1 and children[0][0] not in CONTAINERS:
        prefix, module = f"{prefix}{children[0][0]}.", children[0][1]
    return [prefix + name for name in _parts(module)]


def block_names(model: nn.Module) -> list[str]:
    """List the children of each part that :func:`stage_names` lists, or the part where it has none."""
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
    return Count(*conventions(operators))


def _may_multiply(operator: str) -> bool:
    """Return whether to refuse an operator without a handle: outside PyTorch, or with a name that multiplies."""
    if operator in WITHOUT_PRODUCTS:
        return False
    namespace, _, name = operator.partition("::")
    return namespace != "aten" or any(MULTIPLIES.fullmatch(word) for word in name.split("_"))


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and restore the mode of every submodule."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


@contextmanager
def _without_fused_encoder() -> Iterator[None]:
    """Run PyTorch's multi-head attention as single products, not as one fused operator for inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
