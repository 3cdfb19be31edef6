"""Optimisation of a run: parameter groups, and the learning rate in closed form (Sec. 4.1)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import deepspeed
from torch import nn

from hatnet_core import HATNet
from hatnet_train.config import TrainConfig

logger = logging.getLogger(__name__)


def parameter_groups(model: HATNet, weight_decay: float) -> list[dict[str, object]]:
    """Two optimizer groups: parameters with weight decay, and biases and norms without."""
    exempt = model.no_weight_decay()
    with_decay: list[nn.Parameter] = []
    without_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (without_decay if parameter.ndim <= 1 or name in exempt else with_decay).append(parameter)
    return [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step."""

    peak: float
    warmup_steps: int
    """The last of them has the peak rate; 0 starts at the peak."""
    total_steps: int
    """Steps of the whole run, at least ``warmup_steps``."""
    floor: float = 0.0
    """End of the cosine, as a share of the peak."""

    @classmethod
    def of(cls, config: TrainConfig, steps_per_epoch: int) -> Schedule:
        """Schedule of a run whose epochs have so many optimizer steps."""
        options = config.optimisation
        warmup, steps = round(options.warmup_epochs * steps_per_epoch), options.epochs * steps_per_epoch
        if warmup >= steps:
            logger.warning(
                "the warm-up takes all %d steps of the run, and the learning rate never falls; use fewer "
                "--warmup-epochs than %g, or more --epochs",
                steps,
                options.warmup_epochs,
            )
        return cls(
            peak=config.peak_lr,
            warmup_steps=warmup,
            total_steps=steps,
            floor=options.min_lr / options.lr,
        )

    def __call__(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        return self.peak * lr_factor(
            step, warmup_steps=self.warmup_steps, total_steps=self.total_steps, floor=self.floor
        )


def lr_factor(step: int, *, warmup_steps: int, total_steps: int, floor: float = 0.0) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine to ``floor`` (Sec. 4.1).

    Args:
        step: counted from 0.
        warmup_steps: steps of the warm-up; the last of them has the peak rate. 0 starts at the peak.
        total_steps: steps of the whole run, at least ``warmup_steps``.
        floor: end of the cosine, as a share of the peak.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    return floor + (1 - floor) * cosine


def set_lr(engine: deepspeed.DeepSpeedEngine, lr: float) -> float:
    """Set the learning rate of all parameter groups, and return it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr
