"""The model's weights under DeepSpeed: whole, wherever ZeRO has put them, and their moving average."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from hatnet_core import HATNet


def full_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """All weights in fp32 on every rank, under the names of :class:`HATNet`. All ranks have to call it."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)  # None where DeepSpeed keeps no copy beside the parameter
        weights[name] = (parameter.detach() if full is None else full).float().clone()
    return weights


def whole_model(engine: deepspeed.DeepSpeedEngine, weights: dict[str, Tensor]) -> HATNet:
    """The engine's model with these weights, in evaluation mode on its device, outside DeepSpeed."""
    model = HATNet(**engine.module.config).to(engine.device)
    model.load_state_dict(weights)
    return model.eval()


class Ema:
    """Exponential moving average of the weights (DeiT), in fp32; under ZeRO-3 every rank averages its own part.

    Where DeepSpeed keeps the weights of the model in half precision (``fp16`` from ZeRO-1 on, or a user's ``bf16``),
    it is those that are averaged.

    Args:
        engine: the engine whose weights are followed, from those it has now.
        decay: share of the average that stays at every step.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(engine.module.named_parameters())
        self.parts = [_own_part(parameter).float().clone() for parameter in self._parameters.values()]

    def update(self) -> None:
        """Move towards the weights, after an optimizer step."""
        now = [_own_part(parameter).float() for parameter in self._parameters.values()]
        torch._foreach_lerp_(self.parts, now, 1 - self.decay)

    def weights(self) -> dict[str, Tensor]:
        """The average of all weights on every rank, under the names of :class:`HATNet`. All ranks have to call it."""
        named = zip(self._parameters.items(), self.parts, strict=True)
        return {name: _gathered(parameter, part) for (name, parameter), part in named}


def _own_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: its flat part under ZeRO-3, else all of it."""
    part: Tensor = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
    return part.detach()


def _gathered(parameter: Any, part: Tensor) -> Tensor:
    """The whole of what every rank holds a part of; ``parameter`` knows its shape."""
    if not hasattr(parameter, "ds_tensor"):
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
