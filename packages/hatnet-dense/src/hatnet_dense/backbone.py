"""The backbone of the dense tasks (Sec. 4.2 and 4.3): a HAT-Net without head that gives its stages' feature maps.

Registered in MMEngine's root registry, which the model registries of MMDetection and MMSegmentation fall back to,
so that a config builds it by name. Necks, heads and data come from those libraries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor

from hatnet_core import create_model, load_checkpoint


@MODELS.register_module()
class HATNetBackbone(BaseModule):  # type: ignore[misc]  # mmengine ships no types
    """HAT-Net for dense prediction, built by name from a config.

    G1 and G2 are by default those of the dense tasks (Sec. 4.2); they carry no parameters, so that weights trained
    for classification fit. Stages behind the last one in ``out_indices`` are not built.

    Args:
        variant: one of ``hatnet_core.list_models()``.
        grid_sizes: G1 of the paper's stages 2-4.
        pool_sizes: G2 of the paper's stages 2-4.
        out_indices: the stages to return, out of 0-3 (reductions 4, 8, 16 and 32), first ones first.
        in_chans: channels of the input image.
        drop_path_rate: stochastic depth of the last of all blocks; rises linearly from 0 at the first.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` to start from classification weights, a file that
            ``hatnet_core.load_checkpoint`` reads, when ``init_weights`` is called; None keeps the random ones.

    Raises:
        ValueError: naming the argument and its value, if it is out of range.
    """

    def __init__(
        self,
        variant: str = "hatnet_tiny",
        grid_sizes: Sequence[int] = (8, 8, 8),
        pool_sizes: Sequence[int] = (16, 8, 4),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(_check_init_cfg(init_cfg))
        self.variant = variant
        self.out_indices = _check_out_indices(out_indices)
        self.model = create_model(
            variant,
            num_classes=0,
            grid_sizes=grid_sizes,
            pool_sizes=pool_sizes,
            in_chans=in_chans,
            drop_path_rate=drop_path_rate,
        )
        # parameters that never get a gradient would stop distributed training
        self.model.prune_intermediate_layers(self.out_indices)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, in_chans, H, W] → for each of ``out_indices`` a map [B, C, ⌈H/r⌉, ⌈W/r⌉], r = 4·2^index.

        Raises:
            ValueError: if ``x`` is not of this shape, or H or W is below 32.
        """
        return tuple(self.model.forward_intermediates(x, self.out_indices))

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``, if there is one and it is not loaded yet.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it cannot be read, or holds another variant.
        """
        if self.init_cfg is None or self.is_init:
            super().init_weights()
            return
        self._load_pretrained(Path(self.init_cfg["checkpoint"]))

    def _load_pretrained(self, path: Path) -> None:
        """Read ``path`` into a complete model, strictly, and take over the parameters that exist here."""
        complete = create_model(self.variant, num_classes=0, in_chans=self.model.in_chans)
        load_checkpoint(complete, path, drop_head=True)
        weights = complete.state_dict()
        self.model.load_state_dict({name: weights[name] for name in self.model.state_dict()})
        self.is_init = True


def _check_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    valid = isinstance(out_indices, Sequence) and all(isinstance(i, int) and 0 <= i <= 3 for i in out_indices)
    if not valid or not out_indices:
        raise ValueError(f"out_indices must name stages out of 0, 1, 2, 3, got {out_indices!r}")
    return tuple(out_indices)


def _check_init_cfg(init_cfg: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Only a checkpoint of ours: mmengine's own loading skips parameters whose names differ, silently."""
    if init_cfg is None:
        return None
    if (
        not isinstance(init_cfg, Mapping)
        or set(init_cfg) != {"type", "checkpoint"}
        or init_cfg["type"] != "Pretrained"
    ):
        raise ValueError(f"init_cfg must be dict(type='Pretrained', checkpoint=PATH) or None, got {init_cfg!r}")
    return dict(init_cfg)
