"""Layer-wise learning rate decay for models with a HAT-Net backbone.

The learning rate of a layer is the base rate times ``decay_rate`` to the power of the number of layers after it, as in
BEiT and ConvNeXt. Necks and heads train at the base rate. Layer 0 is the stem; each block is a layer, and the
downsampling of a stage belongs to its first block.
"""

from __future__ import annotations

import re
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from hatnet_dense.backbone import HATNetBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):  # type: ignore[misc]  # mmengine ships no types
    """Optimizer constructor with layer-wise decay of the learning rate.

    In a config::

        optim_wrapper = dict(
            constructor="LayerDecayConstructor",
            paramwise_cfg=dict(decay_rate=0.9),
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05))

    Biases, norms and other vectors have no weight decay.

    Args:
        optim_wrapper_cfg: config of the wrapper, with an ``optimizer`` that has ``lr``.
        paramwise_cfg: ``dict(decay_rate=RATE)``, without other keys, RATE in (0, 1].

    Raises:
        ValueError: if ``paramwise_cfg`` is invalid, ``lr`` is missing, or the model's ``backbone`` is not a HAT-Net.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate: Any = (paramwise_cfg or {}).get("decay_rate")
        number = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate <= 1
        if not number or set(paramwise_cfg or {}) != {"decay_rate"}:
            raise ValueError(f"paramwise_cfg must be dict(decay_rate=RATE) with RATE in (0, 1], got {paramwise_cfg!r}")
        if self.base_lr is None:
            raise ValueError(
                f"optimizer.lr must be a number for LayerDecayConstructor, got {optim_wrapper_cfg['optimizer']}"
            )
        self.decay_rate = float(rate)

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **kwargs: Any) -> None:
        """Append a group of parameters to ``params`` for every layer, with and without weight decay."""
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, HATNetBackbone):
            raise ValueError(
                f"backbone must be a HATNetBackbone for LayerDecayConstructor, got {type(backbone).__name__}"
            )
        depths = list(backbone.model.config["depths"][: len(backbone.model.stages)])
        without_decay = {f"backbone.model.{name}" for name in backbone.model.no_weight_decay()}
        last = sum(depths) + 1
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = layer_of(name, depths)
            decays = parameter.ndim > 1 and name not in without_decay
            scale = self.decay_rate ** (last - layer)
            group: dict[str, Any] = {"params": [], "lr": scale * self.base_lr}
            if self.base_wd is not None:
                group["weight_decay"] = self.base_wd if decays else 0.0
            groups.setdefault((layer, decays), group)["params"].append(parameter)
        params.extend(groups[key] for key in sorted(groups))
        lowest = self.decay_rate**last * self.base_lr
        print_log(f"layer-wise decay: {last + 1} layers, learning rates {lowest:.3g} to {self.base_lr:.3g}", "current")


def layer_of(name: str, depths: list[int]) -> int:
    """Return the layer of a parameter of a detector or segmenter.

    Args:
        name: name of the parameter, such as ``backbone.model.stages.1.blocks.0.attn.q.weight``.
        depths: number of blocks of each stage.

    Returns:
        0 for the stem, 1 to ``sum(depths)`` for the blocks, ``sum(depths) + 1`` for parameters outside the backbone.
    """
    if name.startswith("backbone.model.stem."):
        return 0
    found = re.match(r"backbone\.model\.stages\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
    if found is None:
        return sum(depths) + 1
    stage, block = int(found[1]), int(found[2] or 0)
    return 1 + sum(depths[:stage]) + block
