"""Optimisation of a run: parameter groups, and the learning rate in closed form (Sec. 4.1)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import deepspeed
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]  # timm has no __all__
from torch import nn

from hatnet_core import HATNet
from hatnet_train.config import TrainConfig

logger = logging.getLogger(__name__)


def parameter_groups(model: HATNet, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, object]]:
    """Group the trainable parameters: those with weight decay, and biases and norms without.

    Args:
        model: frozen parameters of it are in no group.
        weight_decay: of the first group.
        layer_decay: factor from the learning rate of a block to that of the one below it. Below 1 there are two
            groups per block, each with its share of the rate as ``lr_scale`` (timm's form).
    """
    exempt = model.no_weight_decay()
    if layer_decay < 1:
        groups = param_groups_layer_decay(model, weight_decay, exempt, layer_decay=layer_decay)
        return [{name: group[name] for name in ("params", "weight_decay", "lr_scale")} for group in groups]
    with_decay: list[nn.Parameter] = []
    without_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        (without_decay if parameter.ndim <= 1 or name in exempt else with_decay).append(parameter)
    return [
        {"params": with_decay, "weight_decay": weight_decay},
        {"params": without_decay, "weight_decay": 0.0},
    ]


def freeze(model: HATNet) -> None:
    """Exclude all parameters but those of the classifier from training."""
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)


def set_training_mode(model: HATNet) -> None:
    """Set a model to training mode, but modules without trainable parameters to evaluation mode.

    A frozen backbone is the same function at every step: without stochastic depth.
    """
    model.train()
    for module in model.children():
        parameters = list(module.parameters())
        module.train(not parameters or any(p.requires_grad for p in parameters))


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
        all_steps = options.epochs * steps_per_epoch
        steps = min(all_steps, options.max_steps or all_steps)
        warmup = round(options.warmup_epochs * steps_per_epoch * (steps / all_steps))
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
    """Set the learning rate of all parameter groups, with their share of it, and return it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
