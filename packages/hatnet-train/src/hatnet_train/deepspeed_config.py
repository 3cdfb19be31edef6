"""From a :class:`TrainConfig` to what ``deepspeed.initialize`` takes: its dictionary, parameter groups, schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from hatnet_core import HATNet
from hatnet_train.config import TrainConfig
from hatnet_train.deepspeed_json import AUTOCAST_DTYPES, enabled, value_at


def deepspeed_config(config: TrainConfig, *, world_size: int, user: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration of a run: batch, AdamW, precision, ZeRO, accumulation and clipping.

    Args:
        config: the run.
        world_size: number of processes.
        user: a user's own configuration, see ``deepspeed_json.py``, that agrees with ``config`` because its fields
            went into it. What only it says is taken over.

    Raises:
        ValueError: if the processes cannot share the batch evenly, or ``user`` has another micro-batch, switches the
            precision off, or has a section of half precision without ZeRO.
    """
    parts = world_size * config.compute.accumulation
    per_part = "an even share for each" if config.mixes else "a share for each"
    if config.optimisation.batch_size % (parts * (2 if config.mixes else 1)):
        raise ValueError(
            f"batch_size must be a multiple of {2 * parts if config.mixes else parts} ({per_part} of {world_size} "
            f"processes × accumulation {config.compute.accumulation}), got {config.optimisation.batch_size}"
        )
    ours: dict[str, Any] = {
        "train_batch_size": config.optimisation.batch_size,
        "train_micro_batch_size_per_gpu": config.optimisation.batch_size // parts,
        "gradient_accumulation_steps": config.compute.accumulation,
        "gradient_clipping": config.optimisation.clip_grad,
        "zero_optimization": {"stage": config.compute.zero_stage},
        "optimizer": {
            "type": "AdamW",
            # PyTorch's own fused AdamW: that of DeepSpeed would have to be compiled first.
            "params": {"lr": config.peak_lr, "betas": [0.9, 0.999], "eps": 1e-8, "torch_adam": True, "fused": True},
        },
    }
    user = user or {}
    if user.get("optimizer", {}).get("params", {}).get("torch_adam") is False:
        del ours["optimizer"]["params"]["fused"]  # DeepSpeed's own AdamW does not know it
    for name in AUTOCAST_DTYPES:
        if enabled(user, name) and config.compute.zero_stage == 0:
            raise ValueError(
                f"a section {name} needs --zero-stage 1 to 3, got 0, where DeepSpeed keeps the fp32 weights out of "
                f"sight; expected --precision {name} or torch_autocast instead"
            )
    if not any(enabled(user, name) for name in (*AUTOCAST_DTYPES, "torch_autocast")):
        ours |= _precision(config)
    _check_user(ours, user, config)
    return _merged(ours, user)


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


def lr_factor(step: int, *, warmup_steps: int, total_steps: int, floor: float = 0.0) -> float:
    """Learning rate of a step as a share of its peak: linear warm-up, then a cosine towards ``floor`` (Sec. 4.1).

    Args:
        step: counted from 0.
        warmup_steps: steps of the warm-up; the last of them has the peak rate. 0 starts at the peak.
        total_steps: steps of the whole run, at least ``warmup_steps``.
        floor: what the cosine leads to, as a share of the peak.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    return floor + (1 - floor) * cosine


def _precision(config: TrainConfig) -> dict[str, Any]:
    if config.compute.precision == "fp32":
        return {}
    if config.compute.precision == "fp16" and config.compute.zero_stage > 0:
        # DeepSpeed 0.19 never lowers the loss scale of fp16 autocast after an overflow under ZeRO-1 to 3, so that no
        # step is ever taken; its own mixed precision does
        return {"fp16": {"enabled": True}}
    return {"torch_autocast": {"enabled": True, "dtype": AUTOCAST_DTYPES[config.compute.precision]}}


def _check_user(ours: Mapping[str, Any], user: Mapping[str, Any], config: TrainConfig) -> None:
    micro = user.get("train_micro_batch_size_per_gpu")
    if micro not in (None, ours["train_micro_batch_size_per_gpu"]):
        raise ValueError(
            f"train_micro_batch_size_per_gpu is {micro}, but --batch-size {ours['train_batch_size']} over all "
            f"processes and passes gives {ours['train_micro_batch_size_per_gpu']}"
        )
    for name in (config.compute.precision, "torch_autocast"):
        if (
            config.compute.precision != "fp32"
            and value_at(user, (name, "enabled")) is False
            and name in (*ours, "bf16")
        ):
            raise ValueError(f"{name} is switched off, but precision is {config.compute.precision}: set --precision")
    if config.compute.precision == "fp16" and config.compute.zero_stage > 0 and enabled(user, "torch_autocast"):
        raise ValueError("torch_autocast in float16 does not recover from overflows under ZeRO; enable fp16 instead")


def _merged(ours: Mapping[str, Any], user: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(ours[name], user[name]) for name in ours.keys() & user.keys() if isinstance(ours[name], dict)
    }
    return {**ours, **user, **both}
