"""The layers around the attention: normalisation, MLP, stem, downsampling and stochastic depth (Sec. 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def group_norm(dim: int) -> nn.GroupNorm:
    """The only normalisation of the model: mean and variance over channels *and* positions of one sample.

    Args:
        dim: number of channels; weight and bias are [dim].
    """
    return nn.GroupNorm(1, dim, eps=1e-6)


class Mlp(nn.Module):
    """Inverted residual with a depthwise convolution (the MLP of Eq. 4; Sec. 3.3).

    GroupNorm → 1×1 (C→E·C) → SiLU → K×K depthwise → SiLU → dropout → 1×1 (E·C→C) → GroupNorm → dropout, the
    convolutions without bias and dropout by whole channels. The residual is outside, in the block.

    Args:
        dim: C, number of input and output channels.
        mlp_ratio: E, the expansion ratio.
        kernel_size: K, side of the depthwise kernel; odd.
        proj_drop_rate: rate of both channel dropouts.

    Raises:
        ValueError: if ``kernel_size`` is even.
    """

    def __init__(self, dim: int, mlp_ratio: int, kernel_size: int = 3, proj_drop_rate: float = 0.0) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        hidden = mlp_ratio * dim
        self.norm = group_norm(dim)
        self.expand = nn.Conv2d(dim, hidden, 1, bias=False)
        self.dwconv = nn.Conv2d(hidden, hidden, kernel_size, padding=kernel_size // 2, groups=hidden, bias=False)
        self.act = nn.SiLU()
        self.drop = nn.Dropout2d(proj_drop_rate)
        self.project = nn.Conv2d(hidden, dim, 1, bias=False)
        self.out_norm = group_norm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        x = self.act(self.expand(self.norm(x)))
        x = self.drop(self.act(self.dwconv(x)))
        return self.drop(self.out_norm(self.project(x)))


class Stem(nn.Module):
    """Stage 1: two 3×3 convolutions of stride 2, to a quarter of the input size (Sec. 3.3, Table 1).

    Args:
        in_chans: channels of the image.
        dim: output channels, those of stage 2.
        hidden_dim: channels between the two convolutions.
    """

    def __init__(self, in_chans: int, dim: int, hidden_dim: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, hidden_dim, 3, stride=2, padding=1)
        self.norm = group_norm(hidden_dim)
        self.act = nn.SiLU()
        self.conv2 = nn.Conv2d(hidden_dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] → [B, dim, ⌈H/4⌉, ⌈W/4⌉]."""
        return self.conv2(self.act(self.norm(self.conv1(x))))


class Downsample(nn.Module):
    """Between stages: a 3×3 convolution of stride 2, then GroupNorm (Sec. 3.3).

    Args:
        in_dim: channels of the stage before.
        dim: channels of the stage behind.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)
        self.norm = group_norm(dim)

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
        """[B, ...] → [B, ...]."""
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * keep.bernoulli_(1 - self.rate).div_(1 - self.rate)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        return f"rate={self.rate:.3f}"
