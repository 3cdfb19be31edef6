"""Parameters and FLOPs of a built model, in the two conventions that Table 2 has to be read with.

One multiply-add is one FLOP in both:

- ``paper``: convolutions, linear layers and normalisations, and what fvcore counts of resampling and adaptive pooling.
  For HAT-Net this is what Table 2 states. A product with a weight is a linear layer, however a model writes it.
- ``complete``: these and every matrix product and convolution of two activations, which in these models are the two
  matrix products of the attention. A counter does not see them when they run inside one fused operator; here it does.

fvcore counts 5 a value of group, layer and instance norms, and of batch norms, which are evaluated with their running
statistics, 2; one less each without weights.

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
"""A word of the name of an operator that multiplies; without a handle such an operator is refused."""

WITHOUT_PRODUCTS = frozenset(
    {
        "aten::linalg_vector_norm",
        "prim::PythonOp.RoIAlignFunction",  # interpolates
        "prim::PythonOp.NMSop",
        "torchvision::nms",
        "torchvision::roi_align",
    }
)
"""Operators that are known to hold no product, against their names or from outside PyTorch."""

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
            ``total``, but for what a model computes outside all of its modules, and in parts without parameters, which
            are left out.
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
        fvcore's analysis, with the products of every ``scaled_dot_product_attention`` under ``attention``, and every
        product with a weight under ``conv`` or ``linear``; what is not seen says ``hatnet_core.flop_handles``.

    Raises:
        ValueError: if an operator may hold products and fvcore has no count of it.
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
    return Count(*conventions(operators))


def _may_multiply(operator: str) -> bool:
    """Whether an operator without a handle has to be refused; torchvision's or one's own is, unless it is known."""
    if operator in WITHOUT_PRODUCTS:
        return False
    namespace, _, name = operator.partition("::")
    return namespace != "aten" or any(MULTIPLIES.fullmatch(word) for word in name.split("_"))


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
