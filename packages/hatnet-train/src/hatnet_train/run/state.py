"""State of a run in a checkpoint, independent of the number of processes and the ZeRO stage.

``model.safetensors``      the weights in fp32, usable by every other command
``model_ema.safetensors``  their moving average, if there is one
``optimizer.safetensors``  the optimizer's moments, ``MOMENT/PARAMETER``
``state.json``             the rest: :class:`RunState`, configuration, scalars of optimizer and loss scaling

No generator is saved: the random numbers of a step depend on the seed, the step and the rank (:func:`seed_step`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import deepspeed
import msgspec
import numpy as np
import torch
from deepspeed import comm as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hatnet_core import save_checkpoint
from hatnet_core.checkpoint import WEIGHTS
from hatnet_train.config import FIELDS, TrainConfig
from hatnet_train.data.augment import MEAN, STD
from hatnet_train.deepspeed.ema import Ema
from hatnet_train.deepspeed.partition import (
    full_weights,
    gather_moments,
    load_moments,
    loss_scaler,
    optimizer_scalars,
    scatter,
    trainable,
    whole_model,
)
from hatnet_train.distributed.collectives import from_rank_0, raise_together
from hatnet_train.distributed.errors import AgreedError
from hatnet_train.records import Count, parse_json
from hatnet_train.run import checkpoint

AVERAGE, OPTIMIZER, STATE = "model_ema.safetensors", "optimizer.safetensors", "state.json"

BEST = "best.safetensors"
"""File of the weights of the best epoch in a run folder."""


@dataclass
class RunState:
    """Progress of a run.

    Attributes:
        step: optimizer steps so far, skipped ones included.
        rows: metrics of the finished epochs.
        skipped: steps to skip because loss or gradients were not finite.
        bad_images: unreadable images of the epoch.
        trained: trained steps of the epoch; the fields below are of these.
        loss: sum of their losses.
        lr: learning rate of the last one.
        seconds: their duration.
        waited: seconds of it spent waiting for data.
    """

    step: Count = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    bad_images: Count = 0
    trained: Count = 0
    loss: float = 0.0
    lr: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    def count(self, loss: float, seconds: float) -> None:
        """Count a step that was trained."""
        self.step += 1
        self.trained += 1
        self.loss += loss
        self.seconds += seconds

    def count_bad(self, images: int, limit: int) -> None:
        """Count images of the epoch that could not be read; AgreedError on every rank if there are too many."""
        self.bad_images += images
        if self.bad_images > limit:
            raise AgreedError(
                f"{self.bad_images} images of epoch {len(self.rows) + 1} could not be read by step {self.step}; "
                f"--max-bad-images is {limit}"
            )

    def metrics(self, batch_size: int) -> dict[str, float]:
        """Metrics of the epoch's steps so far.

        ``train_loss`` (mean), ``lr`` of the last step, ``images_per_second`` over all processes, ``data_wait`` (share
        of the time), ``memory_gb`` (peak of this process), ``seconds``.
        """
        seconds = max(self.seconds, 1e-9)
        return {
            "train_loss": self.loss / self.trained if self.trained else math.nan,
            "lr": self.lr,
            "images_per_second": self.trained * batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory_gb": peak_memory_gb(),
            "seconds": self.seconds,
        }

    def begin_epoch(self) -> None:
        """Forget the sums of the epoch before."""
        self.bad_images = self.trained = 0
        self.loss = self.lr = self.seconds = self.waited = 0.0


@dataclass
class EngineState:
    """Counters of the engine and numbers of the fp16 loss scaler."""

    global_steps: Count
    skipped_steps: Count
    scheduler_step: Count
    loss_scaling: dict[str, bool | int | float]


REST = {"config": dict[str, Any], "data": dict[str, str], "engine": EngineState, "optimizer": dict[str, int | float]}
RECORD: Any = msgspec.defstruct("RECORD", (get_type_hints(RunState, include_extras=True) | REST).items())
"""Content of state.json; all fields are required."""


@dataclass
class Saved:
    """Content of a checkpoint."""

    folder: Path
    state: RunState
    config: dict[str, Any]
    data: dict[str, str]
    engine: EngineState
    scalars: dict[str, float]
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    moments: dict[str, Tensor]


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the generator of dropout and stochastic depth for a step, the same in a resumed run."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))


def contents(
    engine: deepspeed.DeepSpeedEngine,
    ema: Ema | None,
    state: RunState,
    config: TrainConfig,
    *,
    data: Mapping[str, str],
    description: Mapping[str, Any],
) -> dict[str, Callable[[Path], None]]:
    """Gather the state of a run on rank 0; return a writer of each file there, none on other ranks.

    All ranks have to call it. The others gather nothing.

    Args:
        engine: the engine.
        ema: the average of its weights.
        state: progress of the run.
        config: the run.
        data: identifies its data.
        description: what a classifier needs in addition to the model.
    """
    weights = full_weights(engine, to=0)
    average = ema.weights(to=0) if ema is not None else None
    moments = gather_moments(engine)
    if dist.get_rank():
        return {}
    record = {
        **dataclasses.asdict(state),
        "config": config.to_dict(),
        "data": dict(data),
        "engine": dataclasses.asdict(_engine_state(engine, state)),
        "optimizer": optimizer_scalars(engine),
    }
    files: dict[str, Callable[[Path], None]] = {
        WEIGHTS: lambda path: save_checkpoint(whole_model(engine, weights), path, description),
        OPTIMIZER: lambda path: _write(path, save(moments)),
        STATE: lambda path: _write(path, json.dumps(record).encode()),
    }
    if average is not None:
        accuracy = {"top1": state.rows[-1]["ema_top1"]} if "top1" in description else {}
        of_average = {**description, **accuracy}
        files[AVERAGE] = lambda path: save_checkpoint(whole_model(engine, average), path, of_average)
    return files


def description(config: TrainConfig, classes: Sequence[str]) -> dict[str, Any]:
    """Metadata that a classifier needs in addition to the model."""
    return {
        "classes": classes,
        "image_size": config.images.image_size,
        "crop_fraction": config.images.crop_fraction,
        "mean": MEAN,
        "std": STD,
    }


def read_saved(folder: Path) -> Saved:
    """Read a checkpoint: each file once, compared with the manifest.

    Raises:
        DamagedError: if files are missing or differ from the manifest.
        ValueError: naming the file that contains something else.
    """
    tensors: dict[str, dict[str, Tensor]] = {AVERAGE: {}}
    record: Any = None
    for name, content in checkpoint.read(folder):
        if name == STATE:
            record = parse_json(content, RECORD, folder / name)
        elif name in (WEIGHTS, AVERAGE, OPTIMIZER):
            try:
                tensors[name] = load(content)
            except SafetensorError as error:
                raise ValueError(f"{folder / name}: not a valid safetensors file: {error}") from error
    if missing := {WEIGHTS, OPTIMIZER, STATE} - {*tensors, *([STATE] if record else [])}:
        raise ValueError(f"{folder / min(missing)}: missing in {checkpoint.MANIFEST}")
    return Saved(
        folder=folder,
        state=RunState(**{name: getattr(record, name) for name in RunState.__dataclass_fields__}),
        config=record.config,
        data=record.data,
        engine=record.engine,
        scalars=record.optimizer,
        weights=tensors[WEIGHTS],
        average=tensors[AVERAGE],
        moments=tensors[OPTIMIZER],
    )


def read_newest(checkpoints: Path, *, own: bool) -> tuple[Saved | None, list[str]]:
    """Read the newest checkpoint that is not damaged.

    Args:
        checkpoints: the folder of all checkpoints.
        own: rename those that are newer and damaged, see :func:`hatnet_train.run.checkpoint.set_aside`.

    Returns:
        The checkpoint, None without any, and what is wrong with the newer ones.
    """
    saved, problems = None, []
    for folder in checkpoint.committed(checkpoints):
        try:
            saved = read_saved(folder)
            break
        except checkpoint.DamagedError as error:
            problems += error.problems
    if own:
        checkpoint.set_aside(checkpoints, saved.folder if saved is not None else None)
    return saved, problems


def read_together(choose: Callable[[], Saved | None]) -> Saved | None:
    """Read the checkpoint that rank 0 chooses on all ranks.

    Args:
        choose: reads it on rank 0; None for no checkpoint.

    Raises:
        AgreedError: on every rank, if rank 0 cannot choose, or one cannot read it.
    """
    saved, problem = None, None
    if dist.get_rank() == 0:
        try:
            saved = choose()
        except (ValueError, OSError) as error:
            problem = str(error)
    folder, problem = from_rank_0((saved.folder if saved is not None else None, problem))
    if problem is not None:
        raise AgreedError(problem)
    if folder is not None and saved is None:
        try:
            saved = read_saved(folder)
        except ValueError as error:
            problem = str(error)
    raise_together(problem)
    return saved


def check_same_run(saved: Saved, config: TrainConfig, data: Mapping[str, str]) -> None:
    """Check that a run resumes with the same configuration and data.

    Raises:
        ValueError: naming the fields with the values of then and now, or the data.
    """
    if changes := differences(saved.config, saved.data, config.to_dict(), data):
        raise ValueError(
            f"cannot resume from {saved.folder}: {changes}; use the first values, or another --out with --init for "
            "the weights alone"
        )


def differences(
    config_then: Mapping[str, Any], data_then: Mapping[str, str], config: Mapping[str, Any], data: Mapping[str, str]
) -> str:
    """Describe the values with which a run computed that differ now; empty if there are none.

    "auto" is whatever the run had.
    """
    now = json.loads(json.dumps(config))  # with lists for tuples
    then = {name: config_then.get(name, FIELDS[name].default) for name in now}  # a field may be newer than the run
    changed = [
        f"--{name.replace('_', '-')} was {then[name]} and is {value}"
        for name, value in now.items()
        if not (FIELDS[name].may_change or value in (then[name], "auto"))
        and not (FIELDS[name].may_grow and _grows(then[name], value))
    ]
    changed += [
        f"{name} was {then} and is {data.get(name)}" for name, then in data_then.items() if data.get(name) != then
    ]
    return "; ".join(changed)


def _grows(then: int, now: int) -> bool:
    """Return whether a number of epochs or steps, of which 0 is no limit, is larger now."""
    return now == 0 or 0 < then < now


def restore(engine: deepspeed.DeepSpeedEngine, ema: Ema | None, saved: Saved) -> None:
    """Restore an engine that was built with the weights of ``saved``.

    Raises:
        ValueError: if average or moments are those of another model, or there are none.
    """
    _check_shapes(saved, trainable(engine).keys(), averaged=ema is not None)
    scatter(engine, saved.weights, lambda master: master)  # where the masters are more precise than the model
    if ema is not None:
        ema.load(saved.average)
    load_moments(engine, saved.moments, saved.scalars)
    engine.global_steps = saved.engine.global_steps
    engine.skipped_steps = saved.engine.skipped_steps
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    scaler = loss_scaler(engine)
    if scaler is not None:
        if hasattr(scaler, "load_state_dict"):
            scaler.load_state_dict(dict(saved.engine.loss_scaling))
        else:
            vars(scaler).update(saved.engine.loss_scaling)


def _check_shapes(saved: Saved, trained: Collection[str], *, averaged: bool) -> None:
    """Check names and shapes of all tensors to restore; ``trained`` are the weights that have moments."""
    expected = {name: tensor.shape for name, tensor in saved.weights.items()}  # which the model has taken
    moments: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in saved.moments.items():
        moment, _, name = key.partition("/")
        moments.setdefault(moment, {})[name] = tensor.shape
    moved = {name: shape for name, shape in expected.items() if name in trained}
    if any(shapes != moved for shapes in moments.values()) or (
        not moments and saved.engine.global_steps > saved.engine.skipped_steps
    ):
        raise ValueError(f"{saved.folder / OPTIMIZER} must have moments of every trained weight, of its shape")
    if averaged and {name: tensor.shape for name, tensor in saved.average.items()} != expected:
        raise ValueError(f"{saved.folder / AVERAGE} must have an average of every weight, of its shape")


def _engine_state(engine: deepspeed.DeepSpeedEngine, state: RunState) -> EngineState:
    scaler = loss_scaler(engine)
    values = {} if scaler is None else scaler.state_dict() if hasattr(scaler, "state_dict") else vars(scaler)
    return EngineState(
        global_steps=engine.global_steps,
        skipped_steps=engine.skipped_steps,
        scheduler_step=state.step - engine.skipped_steps,
        loss_scaling={name: value for name, value in values.items() if isinstance(value, int | float)},
    )


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def peak_memory_gb() -> float:
    """Largest memory of this process so far in GB (10⁹ bytes): of its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
