"""From a :class:`TrainConfig` to the dictionary that ``deepspeed.initialize`` takes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from hatnet_train.config import TrainConfig
from hatnet_train.deepspeed.user_json import AUTOCAST_DTYPES, enabled, value_at


def deepspeed_config(config: TrainConfig, *, world_size: int, user: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """DeepSpeed's configuration of a run: batch, AdamW, precision, ZeRO, accumulation and clipping.

    Args:
        config: the run.
        world_size: number of processes.
        user: a user's own configuration, see ``deepspeed_json.py``, that agrees with ``config`` because its fields
            went into it. Its other keys are added.

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


def unread_keys(settings: Mapping[str, Any]) -> dict[str, str]:
    """Find keys that DeepSpeed ignores, such as misspelt ones.

    DeepSpeed parses the top level of its configuration by looking up the keys it knows, and reports no others.

    Returns:
        By key, the most similar one that DeepSpeed looks up, or "".

    Raises:
        Exception: whatever DeepSpeed raises of a wrong configuration.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    noted = _Noted(settings)
    DeepSpeedConfig(noted)
    known = noted.sought | {"sequence_parallel_size", "data_parallel_size"}  # those of deepspeed.initialize
    similar = {key: difflib.get_close_matches(key, known, n=1) for key in sorted(settings.keys() - known)}
    return {key: found[0] if found else "" for key, found in similar.items()}


class _Noted(dict[str, Any]):
    """Configuration that notes which keys are looked up."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.sought: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.sought.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.sought.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.sought.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self  # "key in d.keys()" is a look-up, too

    def __copy__(self) -> _Noted:
        return self


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
