"""HAT-Net (Sec. 3.3, Fig. 1, Table 1): stem, four stages of H-MHSA and MLP blocks, pooled linear head.

An image passes :meth:`HATNet.forward_features` (stem, then stage by stage) and :meth:`HATNet.forward_head`.
The paper counts the stem as stage 1; in code ``stages[0]`` is the paper's stage 2. The four configurations are
in ``variants.py``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hatnet_core.attention import Attention, HierarchicalAttention, positive_int
from hatnet_core.layers import Downsample, DropPath, Mlp, Stem

MIN_SIZE = 32
"""Smallest height and width of an input image in pixels: one position is left after a reduction by 32."""


class Block(nn.Module):
    """One transformer block: attention, then MLP, each with a residual under stochastic depth (Eq. 14 and 4).

    Args:
        attn: the attention, [B, C, H, W] → [B, C, H, W].
        mlp: the MLP, likewise.
        drop_path_rate: stochastic depth of both branches.
    """

    def __init__(self, attn: HierarchicalAttention | Attention, mlp: Mlp, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


class Stage(nn.Module):
    """Blocks of one resolution, behind the downsampling that leads to it.

    Args:
        downsample: :class:`Downsample`, or identity in the first stage.
        blocks: the blocks in order.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] → [B, C, ⌈H/2⌉, ⌈W/2⌉], the same size in the first stage."""
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class HATNet(nn.Module):
    """Hierarchical-Attention-based Transformer Network (Sec. 3.3).

    Runs at any height and width from 32 up. ``embed_dims``, ``depths``, ``kernel_sizes`` and ``mlp_ratios`` have
    one entry for each of the paper's stages 2-5, ``grid_sizes`` and ``pool_sizes`` one for each of stages 2-4;
    stage 5 is plain MHSA.

    Args:
        embed_dims: C of each stage; divisible by ``head_dim``.
        depths: number of blocks of each stage.
        head_dim: channels of one attention head.
        kernel_sizes: K, side of the depthwise kernel of each stage; odd.
        mlp_ratios: E, expansion ratio of each stage.
        grid_sizes: G1, side of the local attention grids.
        pool_sizes: G2, pooling of keys and values in the global attention.
        in_chans: channels of the input image.
        num_classes: outputs of the linear head; 0 leaves the pooled features.
        drop_rate: dropout before the linear layer of the head.
        proj_drop_rate: channel dropout at the end of attention and MLP.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.

    Attributes:
        feature_info: for each stage a dict of ``num_chs`` (channels), ``reduction`` (input pixels a position)
            and ``module`` (name of the stage).
        config: the arguments above, G1 and G2 as currently set; ``HATNet(**model.config)`` builds the same model.

    Raises:
        ValueError: naming the argument and its value, if it is out of range.
    """

    def __init__(
        self,
        embed_dims: Sequence[int],
        depths: Sequence[int],
        head_dim: int = 64,
        kernel_sizes: Sequence[int] = (3, 3, 3, 3),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        grid_sizes: Sequence[int] = (8, 7, 7),
        pool_sizes: Sequence[int] = (8, 4, 2),
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_rate: float = 0.2,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "embed_dims": _positive_ints("embed_dims", embed_dims, 4),
            "depths": _positive_ints("depths", depths, 4),
            "head_dim": positive_int("head_dim", head_dim),
            "kernel_sizes": _positive_ints("kernel_sizes", kernel_sizes, 4),
            "mlp_ratios": _positive_ints("mlp_ratios", mlp_ratios, 4),
            "grid_sizes": _positive_ints("grid_sizes", grid_sizes, 3),
            "pool_sizes": _positive_ints("pool_sizes", pool_sizes, 3),
            "in_chans": positive_int("in_chans", in_chans),
            "num_classes": _num_classes(num_classes),
            "drop_rate": _rate("drop_rate", drop_rate),
            "proj_drop_rate": _rate("proj_drop_rate", proj_drop_rate),
            "drop_path_rate": _rate("drop_path_rate", drop_path_rate),
        }
        self.num_classes: int = self.config["num_classes"]
        self.num_features = embed_dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(embed_dims)
        ]
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.stem = Stem(in_chans, embed_dims[0])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            downsample = Downsample(embed_dims[i - 1], dim) if i else nn.Identity()
            blocks = []
            for _ in range(depths[i]):
                attn: HierarchicalAttention | Attention
                if i < 3:
                    attn = HierarchicalAttention(dim, head_dim, grid_sizes[i], pool_sizes[i], proj_drop_rate)
                else:
                    attn = Attention(dim, head_dim, proj_drop_rate)
                mlp = Mlp(dim, mlp_ratios[i], kernel_sizes[i], proj_drop_rate)
                blocks.append(Block(attn, mlp, next(rates)))
            self.stages.append(Stage(downsample, blocks))
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(self.num_features, num_classes)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] → logits [B, num_classes].

        Raises:
            ValueError: if ``x`` is not of this shape, or H or W is below 32.
        """
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] → features of the last stage [B, C5, ⌈H/32⌉, ⌈W/32⌉]."""
        self._check_input(x)
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, C5, H', W'] → logits [B, num_classes], or [B, C5] pooled features if ``pre_logits``."""
        x = self.head_drop(x.mean((-2, -1)))
        return x if pre_logits else self.head(x)

    def forward_intermediates(self, x: Tensor, indices: Sequence[int] = (0, 1, 2, 3)) -> list[Tensor]:
        """Images [B, in_chans, H, W] → feature maps of the stages in ``indices``, at reductions 4, 8, 16 and 32.

        Stages behind the last one asked for are not computed.

        Raises:
            ValueError: if an index is not one of 0-3.
        """
        if not indices or any(i not in range(4) for i in indices):
            raise ValueError(f"indices must name stages out of 0, 1, 2, 3, got {tuple(indices)}")
        self._check_input(x)
        x = self.stem(x)
        features = []
        for stage in self.stages[: max(indices) + 1]:
            x = stage(x)
            features.append(x)
        return [features[i] for i in indices]

    def set_grid(self, grid_sizes: Sequence[int] | None = None, pool_sizes: Sequence[int] | None = None) -> None:
        """Set G1 and G2 of stages 2-4 on the built or loaded model; no parameter changes (Sec. 3.2).

        Args:
            grid_sizes: three values of G1; None keeps them. Classification (8, 7, 7), dense tasks (8, 8, 8).
            pool_sizes: three values of G2; None keeps them. Classification (8, 4, 2), dense tasks (16, 8, 4).

        Raises:
            ValueError: if there are not three values, or one is not a positive integer; nothing is then changed.
        """
        if grid_sizes is None:
            grid_sizes = self.config["grid_sizes"]
        if pool_sizes is None:
            pool_sizes = self.config["pool_sizes"]
        grids = _positive_ints("grid_sizes", grid_sizes, 3)
        pools = _positive_ints("pool_sizes", pool_sizes, 3)
        self.config.update(grid_sizes=grids, pool_sizes=pools)
        for stage, grid, pool in zip(self.stages, grids, pools, strict=False):
            for module in stage.modules():
                if isinstance(module, HierarchicalAttention):
                    module.grid_size, module.pool_size = grid, pool

    def get_classifier(self) -> nn.Module:
        """The linear layer of the head; identity if ``num_classes`` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer by a freshly initialised one; 0 leaves the pooled features.

        Raises:
            ValueError: if ``num_classes`` is negative.
        """
        num_classes = _num_classes(num_classes)
        weight = self.stem.conv1.weight
        self.head = _classifier(self.num_features, num_classes).to(device=weight.device, dtype=weight.dtype)
        self.num_classes = self.config["num_classes"] = num_classes
        self.head.apply(_init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, beyond biases and norms, that take no weight decay: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay (timm's form).

        The head matches none of them, so that timm gives it a group of its own behind the last block.

        Args:
            coarse: one group a stage instead of one a block.
        """
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None)]}
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            ],
        }

    def _check_input(self, x: Tensor) -> None:
        in_chans = self.config["in_chans"]
        if x.ndim != 4 or x.shape[1] != in_chans:
            raise ValueError(f"input must be B×{in_chans}×H×W, got shape {tuple(x.shape)}")
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise ValueError(
                f"input height and width must be at least {MIN_SIZE} pixels, got {x.shape[2]}×{x.shape[3]}"
            )


def _positive_ints(name: str, values: Sequence[int], length: int) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or len(values) != length:
        got = tuple(values) if isinstance(values, list) else values
        raise ValueError(f"{name} must hold {length} integers, got {got!r}")
    return tuple(positive_int(name, value) for value in values)


def _num_classes(value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 0:
        raise ValueError(f"num_classes must be a positive integer, or 0 for no classifier, got {value!r}")
    return operator.index(value)


def _rate(name: str, value: float) -> float:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


def _classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
