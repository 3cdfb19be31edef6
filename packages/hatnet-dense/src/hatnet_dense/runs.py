"""Train and test with MMEngine's Runner, on GPUs or a CPU, in one process or many."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from hatnet_core.checkpoint.zero import read_zero
from hatnet_core.io import atomic_write
from hatnet_dense.annotations import annotation_problems, counted
from hatnet_dense.config import demand, innermost
from hatnet_dense.data_check import naming_files, shortened
from hatnet_dense.errors import cut, said
from hatnet_dense.evaluation import fill_with_zeros
from hatnet_dense.plain_checkpoint import plain, read_checkpoint, read_training_run
from hatnet_dense.survey import is_empty, no_record
from hatnet_dense.workers import Workers

WARMUPS = ("LinearLR", "ConstantLR", "QuadraticWarmupLR")
"""Schedulers that start below the learning rate of the optimizer."""


def train(
    config: Config,
    work_dir: Path,
    resume: str | None = None,
    amp: str | None = None,
    auto_scale_lr: bool = False,
    launcher: str = "none",
    zero_stage: int | None = None,
) -> Path | None:
    """Train the model of a config; checkpoints, logs and data for curves go to ``work_dir``.

    Args:
        config: from :func:`hatnet_dense.config.load_config`; changed in place.
        work_dir: folder of the run, created if missing.
        resume: None for a new run, ``auto`` to resume from the last checkpoint in ``work_dir`` if there is one, or the
            path of a checkpoint.
        amp: dtype of automatic mixed precision, ``float16`` or ``bfloat16``, which needs a GPU; None for fp32.
        auto_scale_lr: scale the learning rate linearly from the batch size that the config was made for.
        launcher: launcher of the processes, in MMEngine's terms: ``none``, ``pytorch`` (torchrun), ``slurm``, ``mpi``.
        zero_stage: train with DeepSpeed, dividing optimizer states (1), gradients (2) and parameters (3) among the
            processes; None for MMEngine's data-parallel training.

    Returns:
        The last checkpoint; with DeepSpeed, whose checkpoints are folders, ``model.pth``, made from the last one. None
        if there is no checkpoint, and in all processes but the first.

    Raises:
        ValueError: if the config lacks what the options need, or data or a checkpoint do not fit.
        FileNotFoundError: if data or checkpoint are missing.
    """
    config.work_dir = str(work_dir)
    demand(config, "train", "train_dataloader.dataset", "train_cfg", "optim_wrapper")
    _use_checkpoint(config, work_dir, resume, deepspeed=zero_stage is not None)
    if amp is not None:
        _use_amp(config, amp)
    if zero_stage is not None:
        _use_zero(config, zero_stage, launcher)
    if auto_scale_lr:
        demand(config, "--auto-scale-lr", "auto_scale_lr.base_batch_size")
        config.auto_scale_lr.enable = True
    with Workers("train_dataloader", "val_dataloader") as workers, _processes(config, launcher):
        runner = _runner(config, launcher, "train", workers)
        schedulers = config.get("param_scheduler") or []
        for warning in _long_warmups(schedulers, runner.train_loop.max_iters, len(runner.train_dataloader)):
            print_log(warning, "current", level=logging.WARNING)
        runner.train()
        if not is_main_process() or not (work_dir / "last_checkpoint").is_file():
            return None
        last = Path((work_dir / "last_checkpoint").read_text())
        if zero_stage is None:
            return last
        _collect_weights(last, runner.train_dataloader.dataset.metainfo, work_dir / "model.pth")
        return work_dir / "model.pth"


def evaluate(
    config: Config, checkpoint: Path, work_dir: Path, show_dir: Path | None = None, launcher: str = "none"
) -> dict[str, float] | None:
    """Evaluate a checkpoint with the evaluators of the config.

    Args:
        config: from :func:`hatnet_dense.config.load_config`; changed in place.
        checkpoint: a checkpoint file of MMEngine.
        work_dir: folder for logs, created if missing.
        show_dir: folder for pictures of truth and prediction side by side; None for no pictures.
        launcher: see :func:`train`.

    Returns:
        The metrics by name, such as ``coco/bbox_mAP_50`` or ``mIoU``, in the units of their evaluator. None in all
        processes but the first.

    Raises:
        ValueError: if the config has no test data, data or checkpoint do not fit, or nothing is measured.
        FileNotFoundError: if data or checkpoint are missing.
    """
    config.work_dir = str(work_dir)
    demand(config, "test", "test_dataloader.dataset", "test_evaluator", "test_cfg")
    read_checkpoint(checkpoint)
    config.load_from, config.resume = str(checkpoint), False
    if show_dir is not None:
        demand(config, "--show-dir", "default_hooks.visualization.type", "visualizer.type")
        config.default_hooks.visualization.draw = True
        if config.default_scope == "mmdet":
            config.default_hooks.visualization.test_out_dir = str(show_dir.absolute())
        else:
            config.default_hooks.visualization.interval = 1
            config.visualizer.save_dir = str(show_dir.absolute())
    with Workers("test_dataloader") as workers, _processes(config, launcher):
        runner = _runner(config, launcher, "test", workers)
        metrics = runner.test()
        # a metric with format_only writes a file instead
        if not metrics and not any(getattr(m, "format_only", False) for m in runner.test_loop.evaluator.metrics):
            raise ValueError("test_evaluator must measure something, got no metrics")
        if not is_main_process():
            return None
        return {name: float(value) for name, value in metrics.items()}


def write_metrics(metrics: dict[str, float], path: Path) -> None:
    """Write metrics as JSON, atomically."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(metrics, indent=2) + "\n")


def _use_checkpoint(config: Config, work_dir: Path, resume: str | None, deepspeed: bool) -> None:
    """Set and check the checkpoint that a run resumes or starts from; arguments as for :func:`train`."""
    if resume is None and config.get("resume"):
        resume = config.get("load_from") or "auto"
    if resume == "auto":
        resume = _last_checkpoint(work_dir)
    config.resume = resume is not None
    if resume is None:
        if config.get("load_from") is not None and not deepspeed:
            read_checkpoint(config.load_from)
        return
    config.load_from = resume
    if not deepspeed:
        read_training_run(resume)
    elif not Path(resume).is_dir():
        raise ValueError(f"--resume must be a folder, as --zero-stage writes it, got {resume}")


def _last_checkpoint(work_dir: Path) -> str | None:
    """Return the last checkpoint of the run in ``work_dir``, None if there is none."""
    note = work_dir / "last_checkpoint"
    if not note.is_file():
        return None
    last = note.read_text(errors="replace").strip()
    if not last or not Path(last).exists():
        raise ValueError(f"{note}: must name an existing checkpoint for --resume without a path, got {last!r}")
    return last


def _collect_weights(folder: Path, dataset_meta: Mapping[str, Any], path: Path) -> None:
    """Write the fp32 weights of a DeepSpeed checkpoint to one file, for ``test`` and ``predict``."""
    content = {"state_dict": dict(read_zero(folder)), "meta": {"dataset_meta": plain(dataset_meta, "dataset_meta")}}
    with atomic_write(path) as place:
        torch.save(content, place)


def _long_warmups(schedulers: Any, iterations: int, per_epoch: int) -> Iterator[str]:
    """Describe schedulers whose warm-up is longer than the run."""
    for i, scheduler in enumerate([schedulers] if isinstance(schedulers, Mapping) else schedulers):
        if scheduler.get("type") not in WARMUPS or scheduler.get("end") is None:
            continue
        end = scheduler["end"] * (per_epoch if scheduler.get("by_epoch", True) else 1)
        if end > iterations > scheduler.get("begin", 0):
            length = counted(iterations, "iteration", "iterations")
            yield (
                f"param_scheduler.{i}.end must be at most the {length} of the run, got {end:,}: the learning rate "
                "does not reach optim_wrapper.optimizer.lr"
            )


def _runner(config: Config, launcher: str, phase: str, workers: Workers) -> Any:
    """Build the runner of a config, with data and evaluators, for the phase ``train`` or ``test``.

    Raises:
        ValueError: if a part cannot be built, whatever MMEngine raises.
        FileNotFoundError: if data is missing.
    """
    config.launcher = launcher
    os.environ.setdefault("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))  # MMEngine reads it
    config.get("visualizer", {}).pop("name", None)  # with a name, a second run would share it
    try:
        runner = RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)
        runner.build_dataloader = workers.reporting(naming_files(runner.build_dataloader))
        for name in ("train_loop", "val_loop") if phase == "train" else ("test_loop",):
            loop = getattr(runner, name)
            if name != "train_loop" and loop is not None:
                fill_with_zeros(loop.evaluator)
    except FileNotFoundError:
        raise
    except Exception as error:  # datasets may be of a library or of the user
        if problems := annotation_problems(config):  # probably the cause, and clearer
            raise ValueError(shortened(problems)) from error
        empty = is_empty(error)
        reason = no_record(innermost(config[f"{phase}_dataloader"].dataset)) if empty else cut(said(error))
        raise ValueError(f"cannot {phase} with this config: {reason}") from error
    return runner


@contextlib.contextmanager
def _processes(config: Config, launcher: str) -> Iterator[None]:
    """Set up gloo for processes without a GPU, because MMEngine supports several on GPUs only."""
    if launcher == "none" or torch.cuda.is_available():
        yield
        return
    if launcher != "pytorch":
        raise ValueError(f"--launcher must be none or pytorch without a GPU, got {launcher}")
    _unsynchronise_norms(config.model)
    wrapper = {"type": "MMDistributedDataParallel", "broadcast_buffers": False, "device_ids": None}
    config.model_wrapper_cfg = {**wrapper, **config.get("model_wrapper_cfg", {})}
    torch.distributed.init_process_group("gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _unsynchronise_norms(value: Any) -> None:
    """Replace synchronised batch norms, which torch has for GPUs only, in place."""
    if isinstance(value, dict):
        if value.get("type") == "SyncBN":
            value["type"] = "BN"
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _unsynchronise_norms(item)


def _use_amp(config: Config, dtype: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError(f"--amp must be omitted without a GPU, got {dtype}")
    kind = config.optim_wrapper.get("type", "OptimWrapper")
    if kind not in ("OptimWrapper", "AmpOptimWrapper"):
        raise ValueError(f"optim_wrapper.type must be OptimWrapper for --amp, got {kind}")
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.dtype = dtype
    config.optim_wrapper.loss_scale = "dynamic" if dtype == "float16" else 1.0


def _use_zero(config: Config, stage: int, launcher: str) -> None:
    kind = config.optim_wrapper.get("type", "OptimWrapper")
    if launcher == "none" or kind != "OptimWrapper":
        raise ValueError(
            f"--zero-stage {stage} must have --launcher and optim_wrapper.type OptimWrapper, without --amp, "
            f"got launcher {launcher} and {kind}"
        )
    if config.get("load_from") is not None and not config.get("resume"):
        raise ValueError(
            f"load_from must be None with --zero-stage, got {config.load_from}; --resume takes a folder of DeepSpeed, "
            "and model.backbone.init_cfg starts from a trained backbone"
        )
    clip = config.optim_wrapper.pop("clip_grad", None)
    config.runner_type = "FlexibleRunner"
    config.strategy = {
        "type": "ZeroStrategy",
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": config.train_dataloader.batch_size,
    }
    if clip is not None:
        config.strategy.gradient_clipping = clip["max_norm"]
    config.optim_wrapper.type = "DeepSpeedOptimWrapper"
