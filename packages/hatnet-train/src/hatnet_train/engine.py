"""The training run: DeepSpeed around the model, epoch by epoch, from a :class:`TrainConfig` to a run folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import socket
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from hatnet_core import create_model, save_checkpoint
from hatnet_train.config import TrainConfig
from hatnet_train.data import MEAN, STD, Digits, evaluation_batches, train_batches
from hatnet_train.deepspeed_config import deepspeed_config, lr_factor, parameter_groups
from hatnet_train.monitor import Monitor
from hatnet_train.sampler import GlobalOrder

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each process; without RANK and WORLD_SIZE the process is alone."""


def train(config: TrainConfig, out: Path) -> list[dict[str, Any]]:
    """Train to the end and leave weights, checkpoint, metrics and curves in ``out``.

    Runs in every process of a launch; a process that no launcher started trains alone. Rank 0 writes
    ``config.json``, ``metrics.jsonl``, ``curves.png``, ``tensorboard/`` and ``model.safetensors``, all ranks
    together ``checkpoints/``.

    Args:
        config: the run.
        out: run folder; made if it is not there.

    Returns:
        One dict an epoch: ``epoch`` (from 1), ``train_loss``, ``eval_loss``, ``top1`` and ``top5`` (percent of the
        held-out images), ``lr`` of its last step, ``images_per_second`` over all processes.

    Raises:
        OSError: if ``out`` already holds files or cannot be made.
        ValueError: if the processes cannot share a batch evenly.
        FloatingPointError: if the loss is no longer finite.
    """
    _join_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    training = Digits(train=True, size=config.image_size)
    held_out = Digits(train=False, size=config.image_size)
    order = GlobalOrder(length=len(training), batch_size=config.batch_size, seed=config.seed)
    settings = deepspeed_config(config, world_size=world_size)
    _open_run_folder(out, config, world_size)
    engine = _build_engine(config, settings, order.steps)
    monitor = Monitor(out) if rank == 0 else None
    rows = []
    for epoch in range(config.epochs):
        row = {"epoch": epoch + 1, **_train_epoch(engine, config, training, order, epoch, monitor)}
        row |= evaluate(engine, held_out, batch_size=config.batch_size)
        rows.append(row)
        if monitor is not None:
            monitor.epoch(row)
            tqdm.write(
                f"epoch {epoch + 1}/{config.epochs}: train loss {row['train_loss']:.4f}, "
                f"held-out loss {row['eval_loss']:.4f}, top-1 {row['top1']:.2f} %, "
                f"{row['images_per_second']:.0f} images/s",
                file=sys.stderr,
            )
        _save_training_state(engine, out / "checkpoints", epoch + 1)
    if monitor is not None:
        monitor.close()
        description = {"classes": Digits.classes, "image_size": config.image_size, "mean": MEAN, "std": STD}
        save_checkpoint(engine.module, out / "model.safetensors", {**description, "top1": rows[-1]["top1"]})
    dist.barrier()
    dist.destroy_process_group()
    return rows


def evaluate(engine: deepspeed.DeepSpeedEngine, data: Digits, *, batch_size: int) -> dict[str, float]:
    """Loss and accuracy over all images of ``data``, each counted once, whatever the number of processes.

    Returns:
        ``eval_loss`` (cross entropy), ``top1`` and ``top5`` (percent), the same on every rank.
    """
    engine.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=engine.device)
    batches = evaluation_batches(data, batch_size=batch_size, rank=dist.get_rank(), world_size=dist.get_world_size())
    with torch.no_grad():
        for images, labels in batches:
            logits, labels = engine(images.to(engine.device)), labels.to(engine.device)
            hits = logits.topk(5).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=loss.device)])
    dist.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    return {"eval_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def _build_engine(config: TrainConfig, settings: dict[str, Any], steps_per_epoch: int) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed, with the same weights on every rank and the learning rate schedule of the run."""
    torch.manual_seed(config.seed)
    model = create_model(
        config.variant, num_classes=len(Digits.classes), drop_rate=0.0, drop_path_rate=config.drop_path_rate
    )
    torch.manual_seed(config.seed + dist.get_rank())  # from here on, every rank drops paths of its own
    schedule = partial(
        lr_factor,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        total_steps=config.epochs * steps_per_epoch,
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, config.weight_decay),
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, schedule),
        config=settings,
    )
    return engine


def _train_epoch(
    engine: deepspeed.DeepSpeedEngine,
    config: TrainConfig,
    data: Digits,
    order: GlobalOrder,
    epoch: int,
    monitor: Monitor | None,
) -> dict[str, float]:
    engine.train()
    batches = train_batches(
        data,
        order,
        epoch=epoch,
        max_shift=config.max_shift,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
    )
    start, total, lr = time.perf_counter(), 0.0, 0.0
    progress = tqdm(
        batches,
        f"epoch {epoch + 1}/{config.epochs}",
        order.steps,
        leave=False,
        disable=monitor is None,
        mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file gets a line now and then, not one a step
    )
    for images, labels in progress:
        logits = engine(images.to(engine.device))
        loss = F.cross_entropy(logits, labels.to(engine.device), label_smoothing=config.label_smoothing)
        engine.backward(loss)
        lr = engine.get_lr()[0]
        engine.step()
        global_loss = _mean_over_ranks(loss)
        if not global_loss < float("inf"):
            raise FloatingPointError(f"loss is {global_loss} at step {engine.global_steps}; a lower --lr may help")
        total += global_loss
        progress.set_postfix(loss=f"{global_loss:.3f}", refresh=False)
        if monitor is not None:
            monitor.train_step(engine.global_steps, global_loss, lr)
    seconds = time.perf_counter() - start
    return {
        "train_loss": total / order.steps,
        "lr": lr,
        "images_per_second": order.steps * order.batch_size / seconds,
    }


def _mean_over_ranks(loss: torch.Tensor) -> float:
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def _save_training_state(engine: deepspeed.DeepSpeedEngine, folder: Path, epoch: int) -> None:
    """DeepSpeed's checkpoint of this epoch; the one before is removed when it is complete."""
    engine.save_checkpoint(str(folder), tag=f"epoch-{epoch:04d}")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder / f"epoch-{epoch - 1:04d}", ignore_errors=True)


def _open_run_folder(out: Path, config: TrainConfig, world_size: int) -> None:
    """Rank 0 makes the folder and writes config.json; what stops it is raised on every rank."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if any(out.iterdir()):
                problem = [f"run folder {out} is not empty; expected a new or empty folder for --out"]
            else:
                (out / "config.json").write_text(json.dumps(_run_record(config, world_size), indent=2) + "\n")
        except OSError as error:
            problem = [f"cannot make run folder {out}: {error.strerror}; expected a writable path for --out"]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        dist.destroy_process_group()
        raise OSError(problem[0])


def _run_record(config: TrainConfig, world_size: int) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "world_size": world_size,
        "command": sys.argv,
        "versions": {name: version(name) for name in ("hatnet-core", "hatnet-train", "deepspeed", "torch", "numpy")},
    }


def _join_processes() -> None:
    """Start the process group that the launcher describes, or a group of one."""
    deepspeed.utils.logger.setLevel(logging.WARNING)
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    alone = "RANK" in missing and "WORLD_SIZE" in missing
    if missing and not alone:
        raise ValueError(
            f"the environment lacks {', '.join(missing)}; a launcher sets {', '.join(LAUNCHER_VARIABLES)}"
        )
    if alone:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Only DeepSpeed's inference uses this kernel, and to compile it takes 1.5 minutes in every new environment.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    _share_cores()


def _share_cores() -> None:
    """On a CPU, divide the cores between the processes of this machine, unless OMP_NUM_THREADS has said how.

    More threads than cores would wait for each other in every parallel region.
    """
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        processes = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
