"""The training run: DeepSpeed around the model, from a :class:`TrainConfig` to a run folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfigError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hatnet_core import HATNet, create_model, load_checkpoint, save_checkpoint
from hatnet_core.checkpoint import describe, head_size, read_state
from hatnet_core.zero import RECORD
from hatnet_train.config import TrainConfig
from hatnet_train.data import Source, open_split
from hatnet_train.data.augment import MEAN, STD, normalise
from hatnet_train.data.loader import Batch, evaluation_batches, train_batches
from hatnet_train.data.mixing import mix, mix_labels
from hatnet_train.deepspeed_config import deepspeed_config, lr_factor, parameter_groups
from hatnet_train.deepspeed_json import AUTOCAST_DTYPES
from hatnet_train.evaluate import evaluate
from hatnet_train.launch import discover, joined
from hatnet_train.monitor import Monitor, Progress, peak_memory_gb
from hatnet_train.preflight import code_digest, compare, format_report, preflight, raise_together
from hatnet_train.record import open_run_folder, run_record, versions
from hatnet_train.sampler import GlobalOrder
from hatnet_train.weights import Ema, full_weights, whole_model

REPORT_EVERY = 10
"""Steps after which the ranks' losses are brought together; at every step the device would have to wait for them."""


class Trainer:
    """A run: the data, the engine, and what is reported. Making one checks all that can be checked before the start.

    Runs in every process of a launch, after ``launch.join``.

    Args:
        config: the run.
        training: the images to train with, see :func:`open_both`.
        held_out: those to evaluate with.
        user: a user's own DeepSpeed configuration, whose fields went into ``config``.

    Raises:
        ValueError: if the processes cannot share a batch evenly, or a value is refused by timm, DeepSpeed or the file
            of weights to start from.
    """

    def __init__(self, config: TrainConfig, training: Source, held_out: Source, user: Mapping[str, Any]) -> None:
        self.config = config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.training, self.held_out = training, held_out
        self.order = GlobalOrder(
            length=len(training), batch_size=config.batch_size, seed=config.seed, repeats=config.repeats
        )
        self.settings = deepspeed_config(config, world_size=self.world_size, user=user)
        self.batches = train_batches(training, self.order, config, rank=self.rank, world_size=self.world_size)
        self.engine = build_engine(config, self.settings, self.order.steps, len(training.classes))
        self.dtype = next(self.engine.module.parameters()).dtype
        self.ema = Ema(self.engine, config.ema_decay) if config.ema_decay else None
        self.monitor: Monitor | None = None
        self.out = Path()

    def run(self, out: Path) -> list[dict[str, Any]]:
        """Train to the end and leave weights, checkpoint, metrics and curves in ``out``.

        Rank 0 writes ``config.json``, ``metrics.jsonl``, ``curves.png``, ``tensorboard/``, ``model.safetensors`` and
        ``model_ema.safetensors``, all ranks together ``checkpoints/``.

        Args:
            out: run folder; made if it is not there.

        Returns:
            One dict an epoch: ``epoch`` (from 1), ``train_loss``, ``eval_loss``, ``top1`` and ``top5`` (percent of the
            ``eval_images`` held-out images), with a moving average ``ema_top1`` and so on, ``lr`` of its last step,
            ``images_per_second`` over all processes, ``data_wait`` (share of the time), ``memory_gb`` (peak of
            rank 0), ``seconds`` of the training.

        Raises:
            ValueError: if ``out`` already holds files or cannot be made, or an image cannot be read.
            FloatingPointError: if the loss is no longer finite.
        """
        open_run_folder(out, run_record(self.config, self.settings, self.world_size))
        self.out, self.monitor = out, Monitor(out) if self.rank == 0 else None
        rows = [self.epoch(epoch) for epoch in range(self.config.epochs)]
        self.finish(rows[-1])
        return rows

    def epoch(self, epoch: int) -> dict[str, Any]:
        """Train one epoch, counted from 0, evaluate, save, and report."""
        row = {"epoch": epoch + 1, **self._train(epoch)}
        self.engine.eval()
        models: list[Any] = [self.engine]
        if self.ema is not None:
            models.append(self._autocast(whole_model(self.engine, self.ema.weights())))
        measured, *averaged = self._evaluate(models)
        row |= measured
        for metrics in averaged:
            row |= {f"ema_{name}": metrics[name] for name in ("eval_loss", "top1", "top5")}
        if self.monitor is not None:
            self.monitor.epoch(row, self.config.epochs)
        self._save_training_state(epoch + 1)
        return row

    def finish(self, row: dict[str, Any]) -> None:
        """Write the final weights, with what is needed to use them."""
        final = {"model.safetensors": (full_weights(self.engine), row["top1"])}
        if self.ema is not None:
            final["model_ema.safetensors"] = (self.ema.weights(), row["ema_top1"])
        if self.monitor is not None:
            self.monitor.close()
            for name, (weights, top1) in final.items():
                model = whole_model(self.engine, weights)
                save_checkpoint(model, self.out / name, {**self._description(), "top1": top1})

    def _train(self, epoch: int) -> dict[str, float]:
        self.engine.train()
        start, waited, losses = time.perf_counter(), 0.0, _Losses(self)
        progress = Progress(epoch, self.config.epochs, self.order) if self.monitor is not None else None
        lr = 0.0
        for step in range(self.order.steps):
            loss = torch.zeros((), device=self.engine.device)
            lr = self.engine.get_lr()[0]
            for _ in range(self.config.accumulation):
                before = time.perf_counter()
                batch = next(self.batches)
                waited += time.perf_counter() - before
                loss += self._pass(batch) / self.config.accumulation
            if self.ema is not None:
                self.ema.update()
            losses.add(loss, lr, last=step + 1 == self.order.steps)
            if progress is not None:
                progress.step(losses.last, waited)
        if progress is not None:
            progress.close()
        seconds = time.perf_counter() - start
        return {
            "train_loss": losses.total / self.order.steps,
            "lr": lr,
            "images_per_second": self.order.steps * self.order.batch_size / seconds,
            "data_wait": waited / seconds,
            "memory_gb": peak_memory_gb(),
            "seconds": seconds,
        }

    def _pass(self, batch: Batch) -> Tensor:
        """One forward and backward pass and, at the last of a step, the update. Returns the loss of this rank."""
        device, config = self.engine.device, self.config
        images = normalise(batch.images.to(device, non_blocking=True))
        targets = batch.labels.to(device, non_blocking=True)
        smoothing = config.label_smoothing
        if config.mixes:
            mixing = batch.mixing.to(device, non_blocking=True)
            images = mix(images, mixing)
            targets, smoothing = mix_labels(targets, mixing, len(self.training.classes), smoothing), 0.0
        logits = self.engine(images.to(self.dtype))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def _evaluate(self, models: Sequence[Any]) -> list[dict[str, Any]]:
        config = self.config
        batches = evaluation_batches(
            self.held_out,
            size=config.image_size,
            crop_fraction=config.crop_fraction,
            batch_size=max(1, config.batch_size // self.world_size // config.accumulation),
            workers=config.workers,
            rank=self.rank,
            world_size=self.world_size,
        )
        return evaluate(models, batches, self.engine.device, self.dtype)

    def _autocast(self, model: HATNet) -> Any:
        """The model as the engine runs it: under autocast of the run's precision, in its dtype."""
        dtype = AUTOCAST_DTYPES.get(self.config.precision)
        context = torch.autocast(
            self.engine.device.type, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None
        )
        return context(model.to(self.dtype))

    def _description(self) -> dict[str, Any]:
        """What a classifier needs beside the model."""
        return {
            "classes": self.training.classes,
            "image_size": self.config.image_size,
            "crop_fraction": self.config.crop_fraction,
            "mean": MEAN,
            "std": STD,
        }

    def _save_training_state(self, epoch: int) -> None:
        """DeepSpeed's checkpoint of this epoch; the one before is removed when it is complete."""
        folder, tag = self.out / "checkpoints", f"epoch-{epoch:04d}"
        if self.rank == 0:  # before the rest: DeepSpeed names the checkpoint as the latest when it has written it
            (folder / tag).mkdir(parents=True, exist_ok=True)
            record = describe(self.engine.module.config, self._description())
            (folder / tag / RECORD).write_text(json.dumps(record))
        self.engine.save_checkpoint(str(folder), tag=tag)
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(folder / f"epoch-{epoch - 1:04d}", ignore_errors=True)


class _Losses:
    """The losses of an epoch's steps, brought together over all ranks every :data:`REPORT_EVERY` steps."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._waiting: list[tuple[Tensor, float]] = []
        self.total, self.last = 0.0, float("nan")

    def add(self, loss: Tensor, lr: float, *, last: bool) -> None:
        """The loss of this rank and the learning rate of a step; raises FloatingPointError if one is not finite."""
        self._waiting.append((loss, lr))
        if not last and len(self._waiting) < REPORT_EVERY:
            return
        means = torch.stack([loss for loss, _ in self._waiting])
        dist.all_reduce(means)
        first = self._trainer.engine.global_steps - len(self._waiting) + 1
        for step, (mean, (_, lr)) in enumerate(zip(means.tolist(), self._waiting, strict=True), first):
            self.last = mean / self._trainer.world_size
            if not abs(self.last) < float("inf"):
                raise FloatingPointError(f"loss is {self.last} at step {step}; a lower --lr may help")
            self.total += self.last
            if self._trainer.monitor is not None:
                self._trainer.monitor.train_step(step, self.last, lr)
        self._waiting.clear()


def open_both(config: TrainConfig) -> tuple[Source, Source]:
    """Training and held-out images of a run, with the same classes."""
    training = open_split(config.data, train=True, size=config.image_size)
    held_out = open_split(config.data, train=False, size=config.image_size, classes=training.classes)
    return training, held_out


def build_engine(
    config: TrainConfig, settings: dict[str, Any], steps_per_epoch: int, num_classes: int
) -> deepspeed.DeepSpeedEngine:
    """The model under DeepSpeed, with the same weights on every rank and the learning rate schedule of the run."""
    if settings.get("fp16", {}).get("enabled") and not get_accelerator().is_fp16_supported():
        raise ValueError(
            f"precision fp16 with zero_stage {config.zero_stage} needs a GPU; on a CPU bf16 and fp32 run at all stages"
        )
    torch.manual_seed(config.seed)
    model = build_model(config, num_classes)
    # from here on, every rank drops paths of its own
    torch.manual_seed(int(np.random.SeedSequence((config.seed, dist.get_rank())).generate_state(1)[0]))
    schedule = partial(
        lr_factor,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        total_steps=config.epochs * steps_per_epoch,
        floor=config.min_lr / config.lr,
    )
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, config.weight_decay),
            lr_scheduler=lambda optimizer: LambdaLR(optimizer, schedule),
            config=settings,
        )
    except (TypeError, ValueError, AssertionError, DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed refuses its configuration: {' '.join(str(error).split())}") from error
    if config.compile:
        engine.compile()
    return engine


def build_model(config: TrainConfig, num_classes: int) -> HATNet:
    """The model of a run, with fresh weights or those of ``config.init``."""
    model = create_model(
        config.variant,
        num_classes=num_classes,
        drop_rate=config.drop_rate,
        drop_path_rate=config.drop_path_rate,
    )
    model.set_grid(config.grid_sizes, config.pool_sizes)
    if config.init:
        state, _ = read_state(config.init)
        load_checkpoint(model, config.init, drop_head=head_size(state) != num_classes)
    model.set_grad_checkpointing(config.activation_checkpointing)
    return model


def train_run(config: TrainConfig, out: Path | None, user: Mapping[str, Any], timeout: float) -> None:
    """The run of ``hatnet-train``: join the other processes, check that all have the same, and train.

    Args:
        config: the run.
        out: run folder; None for a preflight, which checks all that a run needs before its first step, measures the
            network and prints a report.
        user: a user's own DeepSpeed configuration, empty without.
        timeout: seconds to wait for another process.

    Raises:
        ValueError: if processes differ, or as :class:`Trainer` does; likewise FloatingPointError.
    """
    with joined(discover(os.environ), timeout):
        training, held_out = _open_together(config)
        facts = _facts(config, user, training, held_out)
        compare({**facts, **_values(config)})
        trainer = Trainer(config, training, held_out, user)
        if out is not None:
            trainer.run(out)
            return
        gradients = 4 * sum(p.numel() for p in build_model(config, len(training.classes)).parameters())
        report = preflight(facts, gradients)
        if dist.get_rank() == 0:
            sys.stdout.write(format_report(report) + "\n")


def _open_together(config: TrainConfig) -> tuple[Source, Source]:
    """The data of a run; what is wrong with it on one rank is raised on all."""
    opened: list[Source] = []
    problem = None
    try:
        opened += open_both(config)
    except (ValueError, OSError, ImportError) as error:
        problem = str(error)
    raise_together(problem)
    training, held_out = opened
    return training, held_out


def _facts(config: TrainConfig, user: Mapping[str, Any], training: Source, held_out: Source) -> dict[str, str]:
    """What has to be the same in all processes, in short."""
    settings = json.dumps([_values(config), user], sort_keys=True)
    weights = {"weights to start from": _file_digest(Path(config.init))} if config.init else {}
    return {
        "code": code_digest()[:16],
        **versions(),
        "configuration": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "training data": f"{len(training)} images, {training.digest()[:16]}",
        "held-out data": f"{len(held_out)} images, {held_out.digest()[:16]}",
        **weights,
    }


def _values(config: TrainConfig) -> dict[str, str]:
    """Every field but the paths, which may differ: what lies there may not."""
    return {name: str(value) for name, value in dataclasses.asdict(config).items() if name not in ("data", "init")}


def _file_digest(path: Path) -> str:
    if not path.is_file():
        return "a folder" if path.is_dir() else "not there"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
