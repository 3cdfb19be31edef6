"""From a :class:`TrainConfig` to what ``deepspeed.initialize`` takes: its dictionary, parameter groups, schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from hatnet_core import HATNet
from hatnet_train.config import TrainConfig


def deepspeed_config(config: TrainConfig, *, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: batch and AdamW.

    Args:
        config: the run.
        world_size: number of processes.

    Raises:
        ValueError: if the processes cannot share the batch evenly.
    """
    if config.batch_size % world_size:
        raise ValueError(
            f"batch_size must be a multiple of the number of processes, got {config.batch_size} on {world_size}"
        )
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.batch_size // world_size,
        "optimizer": {
            "type": "AdamW",
            # PyTorch's own fused AdamW: that of DeepSpeed would have to be compiled first.
            "params": {"lr": config.lr, "betas": [0.9, 0.999], "eps": 1e-8, "torch_adam": True, "fused": True},
        },
    }


def parameter_groups(model: HATNet, weight_decay: float) -> list[dict[str, Any]]:
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


def lr_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step as a share of its peak: linear warm-up, then a cosine towards zero (Sec. 4.1).

    Args:
        step: counted from 0.
        warmup_steps: steps of the warm-up; the last of them has the peak rate. 0 starts at the peak.
        total_steps: steps of the whole run, more than ``warmup_steps``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))
