"""Training and testing through MMEngine's Runner, on GPUs or on CPU, in one process or in many."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")
"""MMEngine's; ``pytorch`` is torchrun."""

AMP = ("float16", "bfloat16")
"""What ``amp`` may compute in."""


def train(
    config: Config,
    work_dir: Path,
    resume: str | None = None,
    amp: str | None = None,
    auto_scale_lr: bool = False,
    launcher: str = "none",
) -> Path:
    """Train the model of a config; checkpoints, logs and curves' data go to ``work_dir``.

    Args:
        config: of :func:`hatnet_dense.config.load_config`; changed in place.
        work_dir: folder of the run, made if need be.
        resume: None to begin anew, ``auto`` to go on from the last checkpoint in ``work_dir`` if there is one, or
            the path of a checkpoint to go on from.
        amp: None, or what matrix products are computed in, one of :data:`AMP`; needs a GPU.
        auto_scale_lr: scale the learning rate by the batch size, linearly, from what the config was made for.
        launcher: one of :data:`LAUNCHERS`, whatever started the processes.

    Returns:
        The checkpoint written last.

    Raises:
        ValueError: if the config cannot do what is asked for, or data or a checkpoint do not fit.
        FileNotFoundError: if the data or the checkpoint is not there.
    """
    config.work_dir = str(work_dir)
    if resume == "auto":
        config.resume, config.load_from = True, None
    elif resume is not None:
        config.resume, config.load_from = True, str(_existing(resume))
    if amp is not None:
        _use_amp(config, amp)
    if auto_scale_lr:
        if "base_batch_size" not in config.get("auto_scale_lr", {}):
            raise ValueError("the config says no auto_scale_lr.base_batch_size to scale the learning rate from")
        config.auto_scale_lr.enable = True
    _runner(config, launcher, "train").train()
    return Path((work_dir / "last_checkpoint").read_text())


def evaluate(
    config: Config, checkpoint: Path, work_dir: Path, show_dir: Path | None = None, launcher: str = "none"
) -> dict[str, float]:
    """Evaluate a checkpoint with the evaluators of the config.

    Args:
        config: of :func:`hatnet_dense.config.load_config`; changed in place.
        checkpoint: a file of MMEngine.
        work_dir: folder for logs, made if need be.
        show_dir: folder for a picture of every image with truth and prediction side by side; None for none.
        launcher: one of :data:`LAUNCHERS`, whatever started the processes.

    Returns:
        The metrics by name, such as ``coco/bbox_mAP_50`` or ``mIoU``, in the units of their evaluator.

    Raises:
        ValueError: if the config has no test data, or data or checkpoint do not fit.
        FileNotFoundError: if the data or the checkpoint is not there.
    """
    config.work_dir = str(work_dir)
    config.load_from, config.resume = str(_existing(checkpoint)), False
    if show_dir is not None:
        config.default_hooks.visualization.draw = True
        if config.default_scope == "mmdet":
            config.default_hooks.visualization.test_out_dir = str(show_dir.absolute())
        else:
            config.default_hooks.visualization.interval = 1
            config.visualizer.save_dir = str(show_dir.absolute())
    metrics = _runner(config, launcher, "test").test()
    return {name: float(value) for name, value in metrics.items()}


def write_metrics(metrics: dict[str, float], path: Path) -> None:
    """Write metrics as JSON, whole or not at all."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    staged.write_text(json.dumps(metrics, indent=2) + "\n")
    staged.replace(path)


def _runner(config: Config, launcher: str, phase: str) -> Any:
    if f"{phase}_dataloader" not in config or config[f"{phase}_dataloader"] is None:
        raise ValueError(f"the config has no {phase}_dataloader, and so no data to {phase}")
    config.launcher = launcher
    if launcher != "none" and not torch.cuda.is_available():
        _start_gloo(config, launcher)
    os.environ.setdefault("LOCAL_RANK", "0")
    config.get("visualizer", {}).pop("name", None)  # by it, a second run would find that of the first
    return RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)


def _start_gloo(config: Config, launcher: str) -> None:
    """Processes that talk without a GPU; MMEngine would ask for one."""
    if launcher != "pytorch":
        raise ValueError(f"without a GPU, launcher must be none or pytorch, got {launcher}")
    torch.distributed.init_process_group("gloo")
    config.setdefault("model_wrapper_cfg", {"type": "MMDistributedDataParallel", "broadcast_buffers": False})


def _use_amp(config: Config, dtype: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError(f"--amp {dtype} needs a GPU, which is not to be found; expected a run without it")
    kind = config.optim_wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(f"--amp needs optim_wrapper.type OptimWrapper, got {kind}")
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.dtype = dtype
    config.optim_wrapper.loss_scale = "dynamic" if dtype == "float16" else 1.0


def _existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: expected an existing file")
    return Path(path)
