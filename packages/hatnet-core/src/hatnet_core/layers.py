"""The layers around the attention: normalisation, MLP, stem, downsampling and stochastic depth (Sec. 3.3).

Read :class:`Mlp` first. A layer that a kernel may compute has both branches in one function below or in its
``forward``: the kernel, chosen by ``kernels.path``, and PyTorch's own operations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hatnet_core import kernels
from hatnet_core.stock import GELU, Conv2d, Dropout2d, SiLU, is_stock

ACTIVATIONS: dict[str, type[SiLU | GELU]] = {"silu": SiLU, "gelu": GELU}
_NAMES = {kind: name for name, kind in ACTIVATIONS.items()}


class GroupNorm(nn.GroupNorm):
    """The only normalisation of the model: mean and variance over channels *and* positions of one sample.

    PyTorch's with one group and eps 1e-6.

    Args:
        dim: number of channels; weight and bias are [dim].
        keep_float32: return float32 under autocast from the Triton kernel, too, as PyTorch does. Results that enter
            the residual stream need it.
    """

    def __init__(self, dim: int, keep_float32: bool = False) -> None:
        super().__init__(1, dim, eps=1e-6)
        self.keep_float32 = keep_float32

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return group_norm(x, self.weight, self.bias, self.eps, self.keep_float32)


class Mlp(nn.Module):
    """Inverted residual with a depthwise convolution (the MLP of Eq. 4; Sec. 3.3).

    GroupNorm → 1×1 (C→E·C) → SiLU → K×K depthwise → SiLU → dropout → 1×1 (E·C→C) → GroupNorm → dropout. The
    convolutions have no bias, and dropout is by whole channels. The residual is outside, in the block. Without the
    depthwise convolution (the pure transformer of Sec. 4.4) the activation after it goes as well, since two in a row
    would be another nonlinearity.

    A kernel may compute the layers between the norms from their weights (see :func:`inverted_residual`), as long as
    they are stock. A layer that has hooks or was replaced, patched, parametrized or sharded is called.

    Args:
        dim: C, number of input and output channels.
        mlp_ratio: E, the expansion ratio.
        kernel_size: K, side of the depthwise kernel; odd.
        proj_drop_rate: rate of both channel dropouts.
        activation: ``silu`` or ``gelu``.
        depthwise: use a depthwise convolution.

    Raises:
        ValueError: if ``kernel_size`` is even.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: int,
        kernel_size: int = 3,
        proj_drop_rate: float = 0.0,
        activation: str = "silu",
        depthwise: bool = True,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        hidden = mlp_ratio * dim
        self.norm = GroupNorm(dim)
        self.expand = Conv2d(dim, hidden, 1, bias=False)
        padding = kernel_size // 2
        self.dwconv = (
            Conv2d(hidden, hidden, kernel_size, padding=padding, groups=hidden, bias=False) if depthwise else None
        )
        # one instance per place: hooks and quantisation observe a module, not a call
        self.act1 = ACTIVATIONS[activation]()
        self.act2 = ACTIVATIONS[activation]() if depthwise else nn.Identity()
        self.drop1 = Dropout2d(proj_drop_rate)
        self.project = Conv2d(hidden, dim, 1, bias=False)
        self.out_norm = GroupNorm(dim, keep_float32=True)
        self.drop2 = Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return self.drop2(self.out_norm(inverted_residual(self, self.norm(x))))


@torch.fx.wrap
def inverted_residual(mlp: Mlp, x: Tensor) -> Tensor:
    """Compute ``mlp`` between its norms: 1×1 → activation → K×K depthwise → activation → dropout → 1×1.

    Args:
        mlp: whose layers are called, or computed by a kernel.
        x: [B, C, H, W].

    Returns:
        [B, C, H, W], the dtype of ``x``, under autocast that of autocast.
    """
    dwconv, kernel = mlp.dwconv, _kernel(mlp, x)
    if dwconv is not None and kernel == "slices":  # all of it, a slice of the wide map at a time
        from hatnet_core.kernels import mlp as mlp_slices  # registers an operator, which an import need not wait for

        weights = (mlp.expand.weight, dwconv.weight, mlp.project.weight)
        return mlp_slices.inverted_residual(x, *weights, _NAMES[type(mlp.act1)])
    if dwconv is not None and kernel == "triton":  # activation, depthwise and activation in one pass
        from hatnet_core.kernels import triton_depthwise

        x = mlp.expand(x)
        weight = dwconv.weight.to(x.dtype) if torch.is_autocast_enabled(x.device.type) else dwconv.weight
        return mlp.project(mlp.drop1(triton_depthwise.activated_depthwise(x, weight)))
    x = mlp.act1(mlp.expand(x))
    if dwconv is not None:
        x = mlp.act2(dwconv(x))
    return mlp.project(mlp.drop1(x))


def _kernel(mlp: Mlp, x: Tensor) -> str:
    """Return the kernel that may compute layers of ``mlp`` instead of calling them, or an empty string."""
    path, dwconv = kernels.path(x), mlp.dwconv
    if not path or dwconv is None or type(mlp.act1) is not type(mlp.act2):
        return ""
    if not all(map(is_stock, (mlp.act1, dwconv, mlp.act2))) or not _is_depthwise(dwconv):
        return ""
    if path == "triton":
        return kernels.path(x, dwconv.weight) if type(mlp.act1) is SiLU else ""
    pointwise = (mlp.expand, mlp.project)
    if not all(map(is_stock, (*pointwise, mlp.drop1))) or not all(map(_is_pointwise, pointwise)):
        return ""
    weights = [mlp.expand.weight, dwconv.weight, mlp.project.weight]
    same_dtype = all(w.dtype == x.dtype for w in weights)  # PyTorch's layers refuse others
    return kernels.path(x, *weights) if same_dtype or torch.is_autocast_enabled("cpu") else ""


def _is_depthwise(layer: nn.Conv2d) -> bool:
    square = layer.kernel_size[0] == layer.kernel_size[1]
    return square and layer.bias is None and layer.groups == layer.in_channels == layer.out_channels


def _is_pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.bias is None and layer.groups == 1


@torch.fx.wrap
def group_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, keep_float32: bool = False) -> Tensor:
    """GroupNorm with one group of ``x`` [B, C, H, W], in the dtype of ``x``.

    Under autocast PyTorch's result is float32. The Triton kernel's has the dtype of autocast, which the next matrix
    product needs anyway, unless ``keep_float32``.
    """
    if kernels.path(x, weight, bias) == "triton":
        from hatnet_core.kernels import triton_group_norm

        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.float32 if keep_float32 else torch.get_autocast_dtype(x.device.type)
        return triton_group_norm.group_norm(x, weight, bias, eps, dtype)
    if kernels.is_mapped(x):
        x = x.contiguous()  # torch.vmap cannot normalise a channels_last map
    return F.group_norm(x, 1, weight, bias, eps)


@torch.fx.wrap
def lay_out(x: Tensor, *weights: Tensor) -> Tensor:
    """Return ``x`` [B, C, H, W] in the layout of the kernels: channels_last where one may run.

    There a 1×1 convolution is one matrix product, and positions are tokens without a copy. The reference is in NCHW.
    """
    if torch.compiler.is_exporting():  # always copy: to ask whether it is needed would bind the program to a size
        return x.clone(memory_format=torch.contiguous_format)
    if kernels.mode() == "reference":
        return x.contiguous()
    return x.contiguous(memory_format=torch.channels_last) if kernels.path(x, *weights) else x


class Stem(nn.Module):
    """Stage 1: two 3×3 convolutions of stride 2, to a quarter of the input size (Sec. 3.3, Table 1).

    Args:
        in_chans: channels of the image.
        dim: output channels, those of stage 2.
        hidden_dim: channels between the two convolutions.
        activation: ``silu`` or ``gelu``.
    """

    def __init__(self, in_chans: int, dim: int, hidden_dim: int = 16, activation: str = "silu") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden_dim, 3, stride=2, padding=1)
        self.norm = GroupNorm(hidden_dim)
        self.act = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(hidden_dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] → [B, dim, ⌈H/4⌉, ⌈W/4⌉]."""
        return self.conv2(self.act(self.norm(self.conv1(lay_out(x, self.conv1.weight)))))


class Downsample(nn.Module):
    """Between stages: a 3×3 convolution of stride 2, then GroupNorm (Sec. 3.3).

    Args:
        in_dim: channels of the preceding stage.
        dim: channels of the following stage.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = GroupNorm(dim, keep_float32=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim, H, W] → [B, dim, ⌈H/2⌉, ⌈W/2⌉]."""
        return self.norm(self.conv(x))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop the whole branch of a sample and rescale the branches that stay.

    Args:
        rate: probability with which a sample's branch is dropped, in [0, 1).

    Raises:
        ValueError: if ``rate`` is outside [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], 1, 1, 1)  # one number per sample: 0, or 1 over the share that stays
        return x * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of this layer."""
        return f"rate={self.rate:.3f}"
