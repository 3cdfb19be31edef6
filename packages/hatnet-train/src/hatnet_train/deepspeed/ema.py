"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import deepspeed
import torch
from torch import Tensor

from hatnet_train.deepspeed.partition import gather, masters, scatter, with_frozen


class Ema:
    """Exponential moving average of the fp32 weights (DeiT); under ZeRO every rank averages its own part.

    Args:
        engine: the engine whose weights are followed, from those it has now.
        decay: share of the average that stays at every step.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self._masters = masters(engine)
        self._averages = {id(master): master.detach().float().clone() for master in self._masters}

    def update(self) -> None:
        """Move towards the weights, after an optimizer step."""
        now = [master.detach().float() for master in self._masters]
        # private, but what torch.optim.swa_utils averages with; one kernel for all tensors
        torch._foreach_lerp_(list(self._averages.values()), now, 1 - self.decay)

    def weights(self, *, to: int | None = None) -> dict[str, Tensor]:
        """Gather the average of all weights, by the names of :class:`HATNet`, as :func:`gather` does."""
        return with_frozen(self._engine, gather(self._engine, self._average, to=to), to=to)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from an average that :meth:`weights` returned, on any number of processes."""
        scatter(self._engine, weights, self._average)

    def _average(self, master: Tensor) -> Tensor:
        return self._averages[id(master)]
