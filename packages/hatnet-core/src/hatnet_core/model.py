"""HAT-Net (Sec. 3.3, Fig. 1, Table 1): stem, four stages of H-MHSA and MLP blocks, pooled linear head.

An image passes :meth:`HATNet.forward_features` (stem, then stage by stage) and :meth:`HATNet.forward_head`. The paper
counts the stem as stage 1; in code ``stages[0]`` is the paper's stage 2. The four configurations are in
``variants.py``.

The other methods are those of a timm model, with the same names, arguments and meaning. ``torch.jit.script`` is not
supported: TorchScript is deprecated, and ``torch.export`` (see ``export.py``) gives one program for every batch size,
height and width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Concatenate, ParamSpec

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hatnet_core import kernels
from hatnet_core.attention import Attention, HierarchicalAttention, WindowAttention
from hatnet_core.checks import check_images, stage_indices
from hatnet_core.config import HATNetConfig, positive_ints
from hatnet_core.layers import Downsample, DropPath, Mlp, Stem
from hatnet_core.variants import MIN_SIZE

torch.fx.wrap("check_images")  # a node of traced graphs; has to be named in the module that calls it

P = ParamSpec("P")


def _arguments_of(config: Callable[P, Any]) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give an ``__init__`` of ``*args, **kwargs`` the signature of ``config``, for readers and type checkers."""

    def decorate(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        init.__signature__ = inspect.signature(config.__init__)  # type: ignore[attr-defined]
        return init

    return decorate


class Block(nn.Module):
    """One transformer block: attention, then MLP, each with a residual under stochastic depth (Eq. 14 and 4).

    Args:
        attn: the attention, [B, C, H, W] → [B, C, H, W].
        mlp: the MLP, [B, C, H, W] → [B, C, H, W].
        drop_path_rate: stochastic depth of both branches.
    """

    def __init__(self, attn: nn.Module, mlp: Mlp, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.attn = attn
        self.mlp = mlp
        self.drop_path1 = DropPath(drop_path_rate)  # one instance per place, as in Mlp
        self.drop_path2 = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C, H, W]."""
        x = x + self.drop_path1(self.attn(x))
        return x + self.drop_path2(self.mlp(x))


class Stage(nn.Module):
    """A downsampling layer followed by the blocks at that resolution.

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

    Runs at any height and width from 32 up. Takes the arguments of :class:`hatnet_core.config.HATNetConfig`.

    Attributes:
        feature_info: for each stage a dict of ``num_chs`` (channels), ``reduction`` (input pixels per
            position) and ``module`` (name of the stage).
        num_features: channels of the last stage.
        config: the arguments, as currently set; ``HATNet(**model.config)`` builds the same model.

    Raises:
        ValueError: if an argument is out of range.
    """

    @_arguments_of(HATNetConfig)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.config = config = HATNetConfig(*args, **kwargs)
        self.in_chans = config.in_chans
        self.num_classes = config.num_classes
        self.global_pool = config.global_pool
        self.num_features = self.head_hidden_size = config.embed_dims[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"stages.{i}"} for i, dim in enumerate(config.embed_dims)
        ]
        self.stem = Stem(config.in_chans, config.embed_dims[0], activation=config.activation)
        self.stages = nn.Sequential(*(_make_stage(config, i) for i in range(4)))
        self.head_drop = nn.Dropout(config.drop_rate)
        self.head = _classifier(self.num_features, self.num_classes)
        self.apply(_init_weights)
        self._try_kernels()

    def _apply(self, *args: Any, **kwargs: Any) -> HATNet:
        # private, but all of to(), cuda() and the like call it, of this model and of one around it
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._try_kernels()
        return self

    def _try_kernels(self) -> None:
        """Try the kernels on the model's device: a compiler, which may run it first, cannot."""
        for p in self.parameters():
            kernels.runs_triton(p.device)
            break

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] → logits [B, num_classes].

        Raises:
            ValueError: if ``x`` is not of this shape, not floating, or H or W is below 32.
        """
        with _traced_for_any_size():
            return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] → features of the last stage [B, C5, ⌈H/32⌉, ⌈W/32⌉]."""
        with _traced_for_any_size():
            return self.stages(self.stem(check_images(x, self.in_chans)))

    def forward_maps(self, x: Tensor, last: int) -> list[Tensor]:
        """Images [B, in_chans, H, W] → maps of the stem and of the stages up to ``last``, counted from 0."""
        with _traced_for_any_size():
            maps = [self.stem(check_images(x, self.in_chans))]
            for stage in list(self.stages)[: last + 1]:
                maps.append(stage(maps[-1]))
        return maps

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, C5, H', W'] → logits [B, num_classes], or [B, C5] pooled features if ``pre_logits``."""
        if self.global_pool:
            x = x.mean((-2, -1))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = True,
    ) -> Any:
        """Images [B, in_chans, H, W] → feature maps of the stages, at reductions 4, 8, 16 and 32.

        The arguments are timm's. Only the default of ``intermediates_only`` differs, for the common case of a
        backbone; the models that ``hatnet_core.timm`` registers have timm's default.

        Args:
            x: the images.
            indices: stages to return, in the order of the model, out of 0-3 or -4 to -1 from the end; a number n
                means the last n, None all.
            norm: without effect; HAT-Net has no norm after its last stage.
            stop_early: skip the stages after the last requested one.
            output_fmt: ``NCHW``.
            intermediates_only: return the maps without the final features.

        Returns:
            A list of maps [B, C, ⌈H/r⌉, ⌈W/r⌉]; unless ``intermediates_only``, a pair of the features of the last
            stage computed and this list.

        Raises:
            ValueError: if an index is not a stage, or ``output_fmt`` is not ``NCHW``.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        wanted = stage_indices(indices, len(self.stages))
        last = max(wanted) if stop_early or intermediates_only else len(self.stages) - 1
        features = self.forward_maps(x, last)[1:]
        intermediates = [features[i] for i in wanted]
        return intermediates if intermediates_only else (features[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last requested one, and the head, for use as a backbone (timm's contract).

        Args:
            indices: as for :meth:`forward_intermediates`.
            prune_norm: without effect; HAT-Net has no norm after its last stage.
            prune_head: remove the head even if every stage stays.

        Returns:
            The indices of the requested stages, counted from the front.
        """
        wanted = stage_indices(indices, len(self.stages))
        pruned = max(wanted) + 1 < len(self.stages)
        self.stages = nn.Sequential(*list(self.stages)[: max(wanted) + 1])
        self.num_features = self.head_hidden_size = self.feature_info[len(self.stages) - 1]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return wanted

    def set_grid(self, grid_sizes: Sequence[int] | None = None, pool_sizes: Sequence[int] | None = None) -> None:
        """Set G1 and G2 of stages 2-4 on the built or loaded model; no parameter changes (Sec. 3.2).

        Args:
            grid_sizes: three values of G1; None keeps them. Classification (8, 7, 7), dense tasks (8, 8, 8).
            pool_sizes: three values of G2; None keeps them. Classification (8, 4, 2), dense tasks (16, 8, 4).

        Raises:
            ValueError: if there are not three values, or one is not a positive integer; the model is unchanged.
        """
        self.config = self.config.replace(
            grid_sizes=self.config.grid_sizes if grid_sizes is None else grid_sizes,
            pool_sizes=self.config.pool_sizes if pool_sizes is None else pool_sizes,
        )
        for stage, grid, pool in zip(self.stages, self.config.grid_sizes, self.config.pool_sizes, strict=False):
            for module in stage.modules():
                if isinstance(module, HierarchicalAttention):
                    module.grid_size, module.pool_size = grid, pool

    def set_input_size(
        self,
        img_size: int | Sequence[int],
        grid_sizes: Sequence[int] | None = None,
        pool_sizes: Sequence[int] | None = None,
    ) -> None:
        """Check the size of images, and set G1 and G2 (timm's contract).

        timm's models may be bound to a size. HAT-Net runs at any size without this call.

        Args:
            img_size: height and width in pixels, or one number for both.
            grid_sizes: three values of G1; None keeps them.
            pool_sizes: three values of G2; None keeps them.

        Raises:
            ValueError: if a side is below 32, or a value of G1 or G2 is not a positive integer.
        """
        sides = img_size if isinstance(img_size, Sequence) else (img_size, img_size)
        if any(side < MIN_SIZE for side in positive_ints("img_size", sides, 2)):
            raise ValueError(f"img_size must be at least {MIN_SIZE} pixels, got {sides[0]}×{sides[1]}")
        self.set_grid(grid_sizes, pool_sizes)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer of the head; identity if ``num_classes`` is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer by a freshly initialised one; 0 returns the pooled features.

        Args:
            num_classes: outputs of the new layer.
            global_pool: ``avg`` or an empty string; None keeps it.

        Raises:
            ValueError: if ``num_classes`` is negative, or ``global_pool`` does not go with it.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        self.config = self.config.replace(num_classes=num_classes, global_pool=global_pool)
        self.num_classes, self.global_pool = self.config.num_classes, self.config.global_pool
        weight = self.stem.conv1.weight
        self.head = _classifier(self.num_features, self.num_classes).to(device=weight.device, dtype=weight.dtype)
        self.head.train(self.training)
        self.head.apply(_init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters besides biases and norms without weight decay: the bias tables, as in Swin."""
        return {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group every parameter by depth, for layer-wise learning rate decay (timm's form).

        Args:
            coarse: one group per stage instead of one per block.
        """
        blocks: list[tuple[str, Any]] = [(r"^stages\.(\d+)", None)]
        if not coarse:
            blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stem", "blocks": blocks, "head": r"^head"}


def _make_stage(config: HATNetConfig, i: int) -> Stage:
    dim = config.embed_dims[i]
    downsample = Downsample(config.embed_dims[i - 1], dim) if i else nn.Identity()
    first = sum(config.depths[:i])
    rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").tolist()
    blocks = []
    for j in range(config.depths[i]):
        mlp = Mlp(
            dim,
            config.mlp_ratios[i],
            config.kernel_sizes[i],
            config.proj_drop_rate,
            config.activation,
            config.depthwise,
        )
        blocks.append(Block(_make_attention(config, i, j), mlp, rates[first + j]))
    return Stage(downsample, blocks)


def _make_attention(config: HATNetConfig, i: int, j: int) -> nn.Module:
    dim, head_dim, proj_drop_rate = config.embed_dims[i], config.head_dim, config.proj_drop_rate
    if i == 3:
        return Attention(dim, head_dim, proj_drop_rate)
    if config.attention[i] == "window":
        return WindowAttention(dim, head_dim, shifted=j % 2 == 1, proj_drop_rate=proj_drop_rate)
    return HierarchicalAttention(dim, head_dim, config.grid_sizes[i], config.pool_sizes[i], proj_drop_rate)


def unwrap(model: Any) -> HATNet:
    """Return the :class:`HATNet` inside ``torch.compile``, data parallelism, a moving average or DeepSpeed's engine.

    Raises:
        TypeError: if ``model`` is none of these, or has other parameters as well.
    """
    inner = model
    while not isinstance(inner, HATNet):
        wrapped = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if not isinstance(wrapped, nn.Module) or len(list(wrapped.parameters())) != len(list(inner.parameters())):
            raise TypeError(f"model must be a HATNet, got {type(model).__name__}{_way_to_hatnet(inner)}")
        inner = wrapped
    return inner


def _way_to_hatnet(model: Any) -> str:
    if hasattr(model, "merge_and_unload"):
        return "; merge_and_unload() of a PEFT model returns one"
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    name = next((name for name, module in modules if isinstance(module, HATNet)), None)
    return f"; its {name} is one" if name else ""


def _traced_for_any_size() -> AbstractContextManager[Any]:
    """Keep ``torch.export`` from specialising symbolic sizes on 0 and 1.

    Otherwise the exported program would exclude sizes at which a map has one grid, or one position, along an axis.
    torch's ONNX exporter sets the same.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        import torch.fx.experimental._config as config  # slow to import, needed only here

        return config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # installed at run time
    return nullcontext()


def _classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
