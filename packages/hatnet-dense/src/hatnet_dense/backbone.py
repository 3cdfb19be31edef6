"""Backbone of the dense tasks (Sec. 4.2 and 4.3): a HAT-Net without head that returns the maps of its stages.

It is in MMEngine's root registry, which the model registries of MMDetection and MMSegmentation fall back to. Necks,
heads and data come from those libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hatnet_core import create_model, load_checkpoint
from hatnet_core.pretrained import RELEASED_FILES, RELEASED_URL, released_file


@MODELS.register_module()
class HATNetBackbone(BaseModule):  # type: ignore[misc]  # mmengine ships no types
    """HAT-Net for dense prediction, built by name from a config.

    G1 and G2 are by default those of the dense tasks (Sec. 4.2). They have no parameters, so that weights trained
    for classification fit. Stages after the last one in ``out_indices`` are not built.

    Args:
        variant: one of ``hatnet_core.list_models()``.
        grid_sizes: G1 of the paper's stages 2-4.
        pool_sizes: G2 of the paper's stages 2-4.
        out_indices: stages to return, from 0-3 (reductions 4, 8, 16 and 32), in this order.
        frozen_stages: -1 to train everything, n to freeze the stem and the first n of the four stages, in evaluation
            mode.
        norm_eval: keep the statistics of batch norms, as in the backbones of MMDetection. HAT-Net's own norms (one
            group, Sec. 3.3) have none; this is for layers that are added.
        with_cp: recompute every block in the backward pass, which takes less memory.
        in_chans: channels of the input image.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0 at the first.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` to load trained weights, strictly, when ``init_weights``
            is called. PATH is anything that ``hatnet_core.load_checkpoint`` reads, such as a safetensors file, a
            released ``.pth``, or a run folder of hatnet-train. The URL of the variant's released file is downloaded
            once. None keeps the random weights.

    Raises:
        ValueError: naming the argument and its value, if it is out of range.
    """

    def __init__(
        self,
        variant: str = "hatnet_tiny",
        grid_sizes: Sequence[int] = (8, 8, 8),
        pool_sizes: Sequence[int] = (16, 8, 4),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(_check_init_cfg(init_cfg))
        self.variant = variant
        self.out_indices = check_out_indices(out_indices)
        self.frozen_stages = _check_frozen_stages(frozen_stages)
        self.norm_eval = norm_eval
        self.model = create_model(
            variant,
            num_classes=0,
            grid_sizes=grid_sizes,
            pool_sizes=pool_sizes,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
        )
        # distributed training fails for parameters without a gradient
        self.model.prune_intermediate_layers(self.out_indices)
        self.model.set_grad_checkpointing(with_cp)
        for part in self._frozen():
            part.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, in_chans, H, W] → one map [B, C, ⌈H/r⌉, ⌈W/r⌉] for each of ``out_indices``, r = 4·2^index.

        Raises:
            ValueError: if ``x`` has another shape, or H or W is below 32.
        """
        return tuple(self.model.forward_intermediates(x, self.out_indices))

    def train(self, mode: bool = True) -> HATNetBackbone:
        """Set the training mode, except of frozen stages and, with ``norm_eval``, of batch norms."""
        super().train(mode)
        for part in self._frozen():
            part.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, once.

        Raises:
            FileNotFoundError: if it does not exist.
            OSError: if a released file cannot be downloaded.
            ValueError: if it cannot be read, or is of another variant.
        """
        if self.init_cfg is None or self.is_init:
            super().init_weights()
            return
        self._load_pretrained(self.init_cfg["checkpoint"])

    def _load_pretrained(self, checkpoint: str | Path) -> None:
        """Load ``checkpoint`` into a whole model, strictly, and copy the stages that exist here."""
        path = _local(checkpoint, self.variant)
        whole = create_model(self.variant, num_classes=0, in_chans=self.model.in_chans)
        load_checkpoint(whole, path, drop_head=True)
        weights = whole.state_dict()
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        self.is_init = True
        print_log(f"HATNetBackbone: all {len(self.model.state_dict())} tensors loaded from {path}", "current")

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.model.stem, *list(self.model.stages)[: self.frozen_stages]]


def check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """Return stages as a tuple; raise ValueError unless they are from 0-3."""
    valid = isinstance(out_indices, Sequence) and all(isinstance(i, int) and 0 <= i <= 3 for i in out_indices)
    if not valid or not out_indices:
        raise ValueError(f"out_indices must be from 0, 1, 2, 3, got {out_indices!r}")
    return tuple(out_indices)


def _check_frozen_stages(frozen_stages: int) -> int:
    if isinstance(frozen_stages, bool) or not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= 4:
        raise ValueError(f"frozen_stages must be a whole number from -1 (none) to 4 (all), got {frozen_stages!r}")
    return frozen_stages


def _local(checkpoint: str | Path, variant: str) -> Path:
    """Return the local path of a checkpoint; the only URL that is downloaded is that of the released file."""
    address = str(checkpoint)
    if not address.startswith(("http://", "https://")):
        return Path(checkpoint)
    released = f"{RELEASED_URL}/{RELEASED_FILES[variant]}" if variant in RELEASED_FILES else "none of this variant"
    if address != released:
        raise ValueError(f"checkpoint must be a path or the URL of the released file ({released}), got {address}")
    return released_file(variant)


def _check_init_cfg(init_cfg: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Refuse other ways to initialise: MMEngine's silently skip parameters with other names."""
    if init_cfg is None:
        return None
    if (
        not isinstance(init_cfg, Mapping)
        or set(init_cfg) != {"type", "checkpoint"}
        or init_cfg["type"] != "Pretrained"
    ):
        raise ValueError(f"init_cfg must be dict(type='Pretrained', checkpoint=PATH) or None, got {init_cfg!r}")
    return dict(init_cfg)
