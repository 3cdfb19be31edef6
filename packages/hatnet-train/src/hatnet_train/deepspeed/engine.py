"""The engine: the model of a run under DeepSpeed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor

from hatnet_core import HATNet, create_model, load_checkpoint, set_kernels
from hatnet_core.checkpoint import head_size, read_state
from hatnet_core.pretrained import released_file
from hatnet_train.config import RELEASED, TrainConfig
from hatnet_train.deepspeed.config import unread_keys
from hatnet_train.deepspeed.user_json import AUTOCAST_DTYPES
from hatnet_train.optim import freeze, parameter_groups

logger = logging.getLogger(__name__)


def build_engine(
    config: TrainConfig,
    settings: dict[str, Any],
    num_classes: int,
    weights: Mapping[str, Tensor] | None = None,
) -> deepspeed.DeepSpeedEngine:
    """Build the model under DeepSpeed, with the same weights on every rank.

    Args:
        config: the run.
        settings: DeepSpeed's configuration of it.
        num_classes: outputs of the classifier.
        weights: of the checkpoint to resume from; by default fresh ones, or those of ``config.model.init``.

    Raises:
        ValueError: if DeepSpeed refuses its configuration, or the weights are those of another model.
    """
    if settings.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ValueError(
            f"--precision fp16 with --zero-stage {config.compute.zero_stage} needs a GPU; on a CPU, use bf16 or fp32"
        )
    if config.compute.kernels != "auto":  # which leaves what the process has chosen
        set_kernels(config.compute.kernels)
    if config.compute.deterministic:
        use_deterministic_algorithms()
    torch.manual_seed(config.optimisation.seed)
    model = build_model(config, num_classes, weights)
    try:
        for key, similar in unread_keys(settings).items():
            logger.warning("DeepSpeed ignores the key %r%s", key, f", did you mean {similar}?" if similar else "")
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(
                model, config.optimisation.weight_decay, config.optimisation.layer_decay
            ),
            config=settings,
        )
    except (TypeError, ValueError, AssertionError, LookupError, NotImplementedError, DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed refuses its configuration: {' '.join(str(error).split())}") from error
    if config.compute.compile:
        engine.compile()
    return engine


def autocast(model: HATNet, config: TrainConfig, device: torch.device) -> Any:
    """Run a model outside of the engine under autocast of the run's precision."""
    dtype = AUTOCAST_DTYPES.get(config.compute.precision)
    return torch.autocast(device.type, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)(model)


def use_deterministic_algorithms() -> None:
    """Restrict torch, cuDNN and cuBLAS to algorithms that give the same bits on every run of this process.

    torch raises RuntimeError, naming the operation, where it has no such algorithm.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # costs time and changes no result; the module has this property only at run time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_model(config: TrainConfig, num_classes: int, weights: Mapping[str, Tensor] | None = None) -> HATNet:
    """Build the model with ``weights``, those of ``config.model.init``, or fresh ones."""
    model = create_model(
        config.model.variant,
        num_classes=num_classes,
        drop_rate=config.model.drop_rate,
        drop_path_rate=config.model.drop_path_rate,
    )
    model.set_grid(config.model.grid_sizes, config.model.pool_sizes)
    if weights is not None:
        _load(model, weights)
    elif init := config.initial_weights:
        path = released_file(config.model.variant) if init == RELEASED else init
        state, _ = read_state(path)
        load_checkpoint(model, path, drop_head=head_size(state) != num_classes)
    if config.model.freeze == "backbone":
        freeze(model)
    model.set_grad_checkpointing(config.compute.activation_checkpointing)
    return model


def _load(model: HATNet, weights: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise ValueError(
            f"the checkpoint's weights are of another model: {str(error).splitlines()[-1].strip()}"
        ) from error
