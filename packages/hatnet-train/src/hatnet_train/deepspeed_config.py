"""From a :class:`TrainConfig` to the dictionary that ``deepspeed.initialize`` takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from hatnet_core import HATNet
from hatnet_train.config import TrainConfig


def deepspeed_config(config: TrainConfig, *, steps_per_epoch: int, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: batch, AdamW, and a linear warm-up followed by a cosine to zero.

    Args:
        config: the run.
        steps_per_epoch: optimizer steps of one epoch.
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
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": config.epochs * steps_per_epoch,
                "warmup_num_steps": max(2, round(config.warmup_epochs * steps_per_epoch)),
                "warmup_type": "linear",
                "warmup_min_ratio": 0.0,
                "cos_min_ratio": 0.0,
            },
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
