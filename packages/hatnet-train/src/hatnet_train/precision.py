"""Precision of a run: that of its configuration, or with ``auto`` what the devices of all processes compute fast."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from hatnet_train.config import TrainConfig

logger = logging.getLogger(__name__)

CPU_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Instructions of x86 and ARM that multiply bfloat16. Without them a CPU is several times as slow as in float32."""


def settle_precision(config: TrainConfig, earlier: Mapping[str, Any]) -> TrainConfig:
    """Replace ``auto`` by the precision of the run so far, or of the devices; all ranks have to call it.

    Args:
        config: the run.
        earlier: configuration of the checkpoint that it resumes from, empty without one.
    """
    if config.compute.precision != "auto":
        return config
    if earlier.get("precision", "auto") != "auto":
        return config.replace(precision=earlier["precision"])
    from deepspeed.accelerator import get_accelerator  # seconds of import that hatnet-predict does not need

    device = torch.device(get_accelerator().current_device_name())
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fast_precision(device))
    precision, reason = min(found, key=lambda one: one[0] == "bf16")  # bf16 only if all ranks have it
    if dist.get_rank() == 0:
        logger.info("precision %s: %s", precision, reason)
    return config.replace(precision=precision)


def fast_precision(device: torch.device) -> tuple[str, str]:
    """Return bf16 if a device computes faster in it, else fp32, and the reason."""
    if device.type == "cpu":
        # releases of torch that hatnet-train supports may lack this function
        able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        name = able.get("cpu_name") or "the CPU"
        found = [instructions for instructions in CPU_BF16 if able.get(instructions)]
        if found:
            return "bf16", f"{name} has {found[0]}"
        return "fp32", f"torch reports no bfloat16 instructions of {name} (AMX, AVX512-BF16)"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", f"{name} computes in bfloat16"
        return "fp32", f"{name} does not compute in bfloat16"
    return "fp32", f"bfloat16 is not tested on {device.type}"
