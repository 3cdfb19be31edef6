"""The layers around the attention: normalisation, MLP, stem, downsampling and stochastic depth (Sec. 3.3)."""

from __future__ import annotations

from torch import Tensor, nn

from hatnet_core import kernels

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU}
"""The paper's SiLU, and the GELU that Sec. 4.4 compares it with."""


class GroupNorm(nn.GroupNorm):
    """The only normalisation of the model: mean and variance over channels *and* positions of one sample.

    PyTorch's with one group and eps 1e-6, computed by the chosen kernels.

    Args:
        dim: number of channels; weight and bias are [dim].
        keep_float32: whether the result is float32 under autocast also where the Triton kernel runs, because it
            enters the residual stream.
    """

    def __init__(self, dim: int, keep_float32: bool = False) -> None:
        super().__init__(1, dim, eps=1e-6)
        self.keep_float32 = keep_float32

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        return kernels.group_norm(x, self.weight, self.bias, self.eps, self.keep_float32)


class Mlp(nn.Module):
    """Inverted residual with a depthwise convolution (the MLP of Eq. 4; Sec. 3.3).

    GroupNorm → 1×1 (C→E·C) → SiLU → K×K depthwise → SiLU → dropout → 1×1 (E·C→C) → GroupNorm → dropout, the
    convolutions without bias and dropout by whole channels. The residual is outside, in the block. Without the
    depthwise convolution (the pure transformer of Sec. 4.4) the activation behind it goes as well, since two in a
    row would be another nonlinearity.

    Args:
        dim: C, number of input and output channels.
        mlp_ratio: E, the expansion ratio.
        kernel_size: K, side of the depthwise kernel; odd.
        proj_drop_rate: rate of both channel dropouts.
        activation: ``silu`` or ``gelu``.
        depthwise: whether there is a depthwise convolution.

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
        padding = kernel_size // 2
        self.norm = GroupNorm(dim)
        self.expand = nn.Conv2d(dim, hidden, 1, bias=False)
        self.dwconv = (
            nn.Conv2d(hidden, hidden, kernel_size, padding=padding, groups=hidden, bias=False) if depthwise else None
        )
        # an instance for each place: hooks and quantisation observe a module, not a call
        self.act1 = ACTIVATIONS[activation]()
        self.act2 = ACTIVATIONS[activation]() if depthwise else nn.Identity()
        self.drop1 = nn.Dropout2d(proj_drop_rate)
        self.project = nn.Conv2d(hidden, dim, 1, bias=False)
        self.out_norm = GroupNorm(dim, keep_float32=True)
        self.drop2 = nn.Dropout2d(proj_drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        x = kernels.inverted_residual(
            self.norm(x), self.expand, self.act1, self.dwconv, self.act2, self.drop1, self.project
        )
        return self.drop2(self.out_norm(x))


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
        return self.conv2(self.act(self.norm(self.conv1(kernels.laid_out(x)))))


class Downsample(nn.Module):
    """Between stages: a 3×3 convolution of stride 2, then GroupNorm (Sec. 3.3).

    Args:
        in_dim: channels of the stage before.
        dim: channels of the stage behind.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = GroupNorm(dim, keep_float32=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_dim, H, W] → [B, dim, ⌈H/2⌉, ⌈W/2⌉]."""
        return self.norm(self.conv(x))


class DropPath(nn.Module):
    """Stochastic depth: in training, drops the whole branch of a sample and rescales the branches that stay.

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
        keep = x.new_empty(x.shape[0], 1, 1, 1)
        return x * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return f"rate={self.rate:.3f}"
