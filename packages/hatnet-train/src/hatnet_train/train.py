"""Run of ``hatnet-train`` in every process of a launch: join the others, compare, start or resume, train."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from hatnet_core.pretrained import released_file
from hatnet_train.best import BestWeights, EarlyStopping
from hatnet_train.callbacks import default_callbacks
from hatnet_train.config import FIELDS, RELEASED, TrainConfig
from hatnet_train.data import Source, Split, log_usage, open_split
from hatnet_train.deepspeed.engine import build_model
from hatnet_train.distributed.collectives import compare, raise_together
from hatnet_train.distributed.environment import discover
from hatnet_train.distributed.launch import joined
from hatnet_train.distributed.preflight import code_digest, format_report, preflight
from hatnet_train.optim import Schedule
from hatnet_train.run import checkpoint
from hatnet_train.run.record import versions
from hatnet_train.run.state import Saved, check_same_run, read_newest, read_saved, read_together
from hatnet_train.signals import Signals
from hatnet_train.trainer import Trainer

logger = logging.getLogger(__name__)


def train_run(
    config: TrainConfig,
    out: Path | None,
    user: Mapping[str, Any],
    *,
    resume: str,
    timeout: float,
    signals: Signals,
) -> None:
    """Join the other processes, check that all have the same, and train.

    Args:
        config: the run.
        out: run folder; None for a preflight, which checks all that a run needs before its first step, measures the
            network and prints a report.
        user: a user's own DeepSpeed configuration, empty without.
        resume: "none" to start a run; "auto" to resume from the newest checkpoint in ``out``, or to start without one;
            or the path of a run folder or a checkpoint to resume from.
        timeout: seconds to wait for another process.
        signals: signals that this process receives.

    Raises:
        ValueError: if processes differ, or as :class:`Trainer` does; FloatingPointError is raised as well.
        Preempted: see :meth:`Trainer.run`.
        ConnectionError: if another process is gone or hangs, naming it.
    """
    warnings.filterwarnings(
        "ignore", ".*(all_gather_into_tensor|reduce_scatter_tensor)", FutureWarning
    )  # which DeepSpeed uses
    os.umask(os.umask(0o022) | 0o002)  # what a run writes is not for everybody to change
    with joined(discover(os.environ), timeout) as watch:
        training, held_out = _open_together(config)
        facts = _facts(config, user, training, held_out)
        compare({**facts, **_values(config)})
        data = {name: facts[name] for name in ("training data", "held-out data")}
        saved = _saved(config, out, resume, data) if out is not None else None
        if saved is None:
            _download_together(config)
        resumes = out is not None and (resume == "auto" or (saved is not None and _inside(saved.folder, out)))
        callbacks = default_callbacks(config, watch, signals)
        callbacks += [BestWeights(), EarlyStopping(config.optimisation.early_stopping)]
        trainer = Trainer(config, training, held_out, user, callbacks=callbacks, data=data, saved=saved)
        if saved is not None:
            _log_extension(trainer, saved.config)
        del saved  # the engine has it now
        if out is not None:
            trainer.run(out, resume=resumes)
            return
        gradients = 4 * sum(p.numel() for p in build_model(config, len(training.classes)).parameters())
        report = preflight(facts, gradients)
        if dist.get_rank() == 0:
            sys.stdout.write(format_report(report) + "\n")


def _log_extension(trainer: Trainer, earlier: Mapping[str, Any]) -> None:
    """Log the change of the learning rate where a run is extended."""
    longer = {name: earlier[name] for name, field in FIELDS.items() if field.may_grow and name in earlier}
    old = Schedule.of(trainer.config.replace(**longer), trainer.order.steps)
    new, step = trainer.schedule, trainer.state.step
    if new.total_steps > old.total_steps > 0 and dist.get_rank() == 0:
        logger.info(
            "the run is extended from %d to %d steps: its cosine is that of all of them, so that the learning rate "
            "goes from %.3g to %.3g at step %d, and falls to %.3g",
            *(old.total_steps, new.total_steps, old(step), new(step), step, new(new.total_steps)),
        )


def _saved(config: TrainConfig, out: Path, resume: str, data: Mapping[str, str]) -> Saved | None:
    """Read the checkpoint to resume from, the same on all ranks; None to start a new run."""
    if resume == "none":
        return None
    saved = read_together(lambda: _newest(out, own=True) if resume == "auto" else _named(Path(resume), out))
    if saved is not None:
        problem = None
        try:
            check_same_run(saved, config, data)
        except ValueError as error:
            problem = str(error)
        raise_together(problem)
        logger.info("resuming from step %d, %s", saved.state.step, saved.folder)
    return saved


def _named(path: Path, out: Path) -> Saved:
    """Read the checkpoint that a user named, or the newest of the run folder that was named.

    Raises:
        ValueError: if it is damaged, or the run in ``out`` has newer ones.
    """
    if not (path / checkpoint.MANIFEST).is_file() or (path / "checkpoints").is_dir():
        if (found := _newest(path)) is None:
            raise ValueError(f"cannot resume from {path}: it must be a run folder or a checkpoint, got neither")
        return found
    for newer in checkpoint.committed(out / "checkpoints") if _inside(path, out) else []:
        if newer.samefile(path):
            break
        if not any(checkpoint.check(newer)):
            raise ValueError(
                f"cannot resume from {path} in {out}, which has the newer {newer.name}: use another --out, or "
                "--resume auto"
            )
    try:
        return read_saved(path)
    except checkpoint.DamagedError as error:
        raise ValueError(f"cannot resume from {path}: {error}") from error


def _newest(run: Path, *, own: bool = False) -> Saved | None:
    """Read the newest checkpoint of a run folder, and warn of damaged ones.

    Raises:
        ValueError: if there are only damaged ones.
    """
    saved, problems = read_newest(run / "checkpoints", own=own)
    for problem in problems:
        logger.warning("%s; this checkpoint is not used", problem)
    if saved is None and problems:
        raise ValueError(f"cannot resume from {run}: all its checkpoints are damaged; start another run")
    return saved


def _inside(folder: Path, out: Path) -> bool:
    """Return whether a checkpoint belongs to the run in ``out``."""
    return folder.resolve().parent == (out / "checkpoints").resolve()


def open_both(config: TrainConfig) -> tuple[Source, Source]:
    """Open training and held-out images, with the same classes, at least two."""
    images = config.images
    split = Split(labels=images.labels, held_out=images.held_out, seed=config.optimisation.seed)
    training = open_split(images.data, train=True, size=images.image_size, split=split)
    if len(training.classes) < 2:
        raise ValueError(f"{images.data} must have at least two classes, got 1 ({training.classes[0]})")
    held_out = open_split(images.data, train=False, size=images.image_size, classes=training.classes, split=split)
    return training, held_out


def _open_together(config: TrainConfig) -> tuple[Source, Source]:
    """Open the data of a run; raise the problems of one rank on all."""
    opened: list[Source] = []
    problem = None
    try:
        opened += open_both(config)
    except (ValueError, OSError, ImportError) as error:
        problem = str(error)
    raise_together(problem)
    training, held_out = opened
    if dist.get_rank() == 0:
        log_usage(held_out, training)
    return training, held_out


def _download_together(config: TrainConfig) -> None:
    """Download released weights, if those are wanted, once per host; raise the problems of one rank on all."""
    problem = None
    if config.initial_weights == RELEASED and os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            released_file(config.model.variant)
        except (ValueError, OSError) as error:
            problem = f"{error}; --init FILE takes other weights, --init none fresh ones"
    raise_together(problem)


def _facts(config: TrainConfig, user: Mapping[str, Any], training: Source, held_out: Source) -> dict[str, str]:
    """Digests of everything that must be equal in all processes."""
    settings = json.dumps([_values(config), user], sort_keys=True)
    start = config.initial_weights
    weights = {"weights to start from": start if start == RELEASED else _file_digest(Path(start))} if start else {}
    return {
        "code": code_digest()[:16],
        **versions(),
        "configuration": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "training data": f"{len(training)} images, {training.digest()[:16]}",
        "held-out data": f"{len(held_out)} images, {held_out.digest()[:16]}",
        **weights,
    }


def _values(config: TrainConfig) -> dict[str, str]:
    """All fields but the paths, which may differ."""
    return {name: str(value) for name, value in config.to_dict().items() if name not in ("data", "labels", "init")}


def _file_digest(path: Path) -> str:
    if not path.is_file():
        return "a folder" if path.is_dir() else "not there"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
