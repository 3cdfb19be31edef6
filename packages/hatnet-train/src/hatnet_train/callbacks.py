"""Callbacks of the :class:`~hatnet_train.trainer.Trainer`: what happens around the training steps.

:class:`Callback` lists the hooks. The classes below it are those of every run of ``hatnet-train``
(:func:`default_callbacks`); :func:`register` adds your own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor

from hatnet_core import save_checkpoint
from hatnet_core.checkpoint import WEIGHTS
from hatnet_train.config import TrainConfig
from hatnet_train.deepspeed.partition import full_weights, whole_model
from hatnet_train.distributed.collectives import from_rank_0
from hatnet_train.distributed.errors import AgreedError
from hatnet_train.distributed.heartbeat import Watch
from hatnet_train.monitor import METRICS, Monitor, Progress
from hatnet_train.page import PAGE, run_page, write_page
from hatnet_train.run import checkpoint
from hatnet_train.run.nonfinite import NonFiniteError, dump
from hatnet_train.run.state import AVERAGE, BEST, Saved, contents, description, read_newest, read_saved, read_together
from hatnet_train.signals import Preempted, Signals

if TYPE_CHECKING:
    from hatnet_train.trainer import Trainer

logger = logging.getLogger(__name__)

FAILED_SAVES = 3
"""Checkpoints in a row that cannot be written before a run stops; until then it continues and tries again."""


class Step(NamedTuple):
    """Result of an optimizer step, the same on all ranks."""

    loss: float
    """Mean over all ranks and passes; NaN if the step was skipped."""

    nonfinite: bool = False
    """A rank has a loss or gradient that is not finite."""

    stop: bool = False
    """A callback of a rank asks to stop."""

    bad_images: int = 0
    """Replaced images, over all ranks."""


class Callback:
    """Hooks of a run; override those you need. Every hook is called on every rank.

    What a hook raises ends the run. Raise the same error on all ranks, or the other ranks hang.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Handle the start of the run, or a restart from a checkpoint; ``trainer.engine`` is new."""

    def before_epoch(self, trainer: Trainer) -> None:
        """Handle the start of the remaining steps of an epoch."""

    def before_wait(self, trainer: Trainer) -> None:
        """Handle progress of this rank, which is about to wait for the others."""

    def after_backward(self, trainer: Trainer, loss: Tensor) -> None:
        """Handle the end of a backward pass; ``loss`` is that of this rank, a scalar."""

    def wants_stop(self, trainer: Trainer) -> bool:
        """Return whether the run should be saved and stop after this step; one rank is enough."""
        return False

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Handle the end of a step; ``trainer.state.step`` counts it."""

    def after_epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Handle the end of an epoch; ``row`` are its metrics, see :meth:`Trainer.run`."""

    def after_run(self, trainer: Trainer) -> None:
        """Handle the end of the last epoch."""

    def on_exception(self, trainer: Trainer, error: Exception) -> bool:
        """Handle an error of the training; return True if the run can continue from ``trainer.state``."""
        return False

    def close(self, trainer: Trainer) -> None:
        """Release what the callback holds, however the run ended."""


_Made = TypeVar("_Made", bound=Callable[[], Callback])

_REGISTERED: list[Callable[[], Callback]] = []


def register(make: _Made) -> _Made:
    """Add a callback to every run of this process; a class decorator, or a function that makes the callback."""
    _REGISTERED.append(make)
    return make


def default_callbacks(config: TrainConfig, watch: Watch, signals: Signals) -> list[Callback]:
    """Callbacks of ``hatnet-train``, then the registered ones.

    Args:
        config: the run.
        watch: signs of life of this process.
        signals: signals that this process receives.
    """
    return [
        Heartbeat(watch),
        StopOnSignal(signals),
        Monitoring(),
        Checkpointing(config.checkpoints.checkpoint_steps, config.checkpoints.keep_checkpoints),
        NonFiniteRecovery(config.faults.max_skipped_steps),
        FinalWeights(),
        ResultsPage(),
        *(make() for make in _REGISTERED),
    ]


class Heartbeat(Callback):
    """Mark the progress of this process, so that the others can tell which one hangs."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def before_wait(self, trainer: Trainer) -> None:
        """Mark the progress of this rank."""
        self.watch.mark()


class StopOnSignal(Callback):
    """Stop all ranks after the same step once one of them receives SIGTERM or SIGUSR1."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals

    def wants_stop(self, trainer: Trainer) -> bool:
        """Return whether a signal came."""
        return self.signals.received


class Monitoring(Callback):
    """Report progress, ``metrics.jsonl``, TensorBoard and ``curves.png``, all on rank 0."""

    def __init__(self) -> None:
        self.monitor: Monitor | None = None
        self.progress: Progress | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the reports at the step of the run."""
        self.close(trainer)
        if trainer.rank == 0:
            state, classes = trainer.state, len(trainer.training.classes)
            self.monitor = Monitor(trainer.out, state.rows, state.step, classes=classes)

    def before_epoch(self, trainer: Trainer) -> None:
        """Begin the progress of an epoch."""
        epoch, order, step = len(trainer.state.rows), trainer.order, trainer.state.step
        if self.monitor is not None and step < (epoch + 1) * order.steps:
            done = max(0, step - epoch * order.steps)  # a run with more --max-steps begins before
            self.progress = Progress(epoch, trainer.epochs, order, done=done)

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Report loss and learning rate."""
        state = trainer.state
        if self.monitor is not None and not math.isnan(step.loss):
            self.monitor.train_step(state.step, step.loss, state.lr)
        if self.progress is not None:
            self.progress.step(step.loss, state.waited / max(state.seconds, 1e-9))
            if state.step % trainer.order.steps == 0:
                self.progress.close()

    def after_epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Report the metrics of the epoch."""
        if self.progress is not None:
            self.progress.close()
        if self.monitor is not None:
            self.monitor.epoch(trainer.state.rows, trainer.epochs, trainer.state.step)

    def close(self, trainer: Trainer) -> None:
        """Close progress and reports."""
        if self.progress is not None:
            self.progress.close()
        if self.monitor is not None:
            self.monitor.close()
        self.progress = self.monitor = None


class Checkpointing(Callback):
    """Save checkpoints every so many steps, after each epoch, and when the run is asked to stop.

    Args:
        every: steps from one to the next; 0 saves after epochs only.
        keep: newest checkpoints to keep, in addition to the best.
    """

    def __init__(self, every: int = 0, keep: int = 2) -> None:
        self.every, self.keep = every, keep
        self._failed = 0

    def after_step(self, trainer: Trainer, step: Step) -> None:
        """Save within an epoch."""
        number = trainer.state.step
        if self.every and number % self.every == 0 and number % trainer.order.steps and not step.stop:
            self.save(trainer)

    def after_epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Save an evaluated checkpoint."""
        self.save(trainer)

    def on_exception(self, trainer: Trainer, error: Exception) -> bool:
        """Save before the run stops as asked."""
        if isinstance(error, Preempted):
            self.save(trainer, last=True)
        return False

    def save(self, trainer: Trainer, *, last: bool = False) -> None:
        """Write a checkpoint of the current state; all ranks together.

        Args:
            trainer: the run.
            last: the run ends after it.

        Raises:
            AgreedError: on every rank, if it cannot be written and is the last, or the third in a row.
        """
        state, folder = trainer.state, trainer.out / "checkpoints"
        evaluated = min(len(state.rows) * trainer.order.steps, trainer.schedule.total_steps) == state.step
        top1 = {"top1": state.rows[-1]["top1"]} if evaluated and state.rows else {}
        about = {"step": state.step, "epochs": len(state.rows), **top1}
        text = {**description(trainer.config, trainer.training.classes), **top1}
        files = contents(trainer.engine, trainer.ema, state, trainer.config, data=trainer.data, description=text)
        problem = None
        if trainer.rank == 0:
            name = checkpoint.folder_name(state.step, evaluated=evaluated)
            try:
                written = checkpoint.commit(folder, name, files, about)
            except OSError as error:
                problem = f"cannot save step {state.step} in {folder}: {error.strerror or error}"
            else:
                checkpoint.tidy(folder, self.keep, written)
        problem = from_rank_0(problem)
        self._failed = self._failed + 1 if problem else 0
        if problem and (last or self._failed == FAILED_SAVES):
            reason = "and the run ends here" if last else f"{FAILED_SAVES} times in a row, so the run stops"
            raise AgreedError(f"{problem}, {reason}; earlier checkpoints remain")
        if problem:
            logger.warning("%s; training continues, earlier checkpoints remain", problem)


class NonFiniteRecovery(Callback):
    """Return to the newest checkpoint when loss or gradients are not finite, and skip that step from then on.

    What the step was made of goes to ``nonfinite/`` in the run folder.

    Args:
        limit: steps that may be skipped in a run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_exception(self, trainer: Trainer, error: Exception) -> bool:
        """Recover, or raise FloatingPointError on every rank if too many steps were skipped."""
        if not isinstance(error, NonFiniteError):
            return False
        folder = trainer.out / "nonfinite" / f"step-{error.step:010d}"
        self._dump(trainer, error, folder)
        skipped = [*trainer.state.skipped, error.step]
        if len(skipped) > self.limit:
            raise FloatingPointError(
                f"{error}; see {folder}; {len(skipped) - 1} steps were skipped before, --max-skipped-steps is "
                f"{self.limit}; a lower --lr may help"
            )
        saved = read_together(lambda: self._newest(trainer))
        step = saved.state.step if saved is not None else 0
        logger.warning("%s; see %s; resuming from step %d without that step", error, folder, step)
        trainer.restart(saved, skipped)
        return True

    def _newest(self, trainer: Trainer) -> Saved | None:
        saved, _ = read_newest(trainer.out / "checkpoints", own=True)
        return read_saved(trainer.origin) if saved is None and trainer.origin is not None else saved

    def _dump(self, trainer: Trainer, error: NonFiniteError, folder: Path) -> None:
        epoch, step = divmod(error.step, trainer.order.steps)
        shares = trainer.order.shares(epoch, rank=trainer.rank, world_size=trainer.world_size, first_step=step)
        seed = trainer.config.optimisation.seed
        generators = {"seed": seed, "epoch": epoch, "step": error.step, "rank": trainer.rank}
        try:
            dump(folder, trainer.engine, next(shares), trainer.training, error.losses, generators)
        except OSError as failed:
            logger.warning("cannot write %s: %s", folder, failed.strerror or failed)


class FinalWeights(Callback):
    """Write the final weights, with what is needed to use them, and the manifest of the run folder."""

    def after_run(self, trainer: Trainer) -> None:
        """Write them; AgreedError on every rank if that fails."""
        row, out = trainer.state.rows[-1], trainer.out
        final = {}
        if trainer.ema is not None:
            final[AVERAGE] = (trainer.ema.weights(to=0), row["ema_top1"])
        final[WEIGHTS] = (full_weights(trainer.engine, to=0), row["top1"])
        problem = None
        if trainer.rank == 0:
            text = description(trainer.config, trainer.training.classes)
            try:
                for name, (weights, top1) in final.items():
                    save_checkpoint(whole_model(trainer.engine, weights), out / name, {**text, "top1": top1})
                best = [BEST] if (out / BEST).is_file() else []
                checkpoint.write_manifest(out, [*final, *best, METRICS], {"step": trainer.state.step})
            except OSError as error:
                reason = error.strerror or error
                problem = f"cannot write the final weights to {out}: {reason}; --resume auto tries again"
        if problem := from_rank_0(problem):
            raise AgreedError(problem)


class ResultsPage(Callback):
    """Write the page about the run, ``results.html``, on rank 0; a page that cannot be written is a warning."""

    def after_run(self, trainer: Trainer) -> None:
        """Write it, from the last evaluation."""
        if trainer.predictions is None:  # resumed after the last one
            trainer.evaluate()
        held_out = trainer.held_out
        results = trainer.predictions.gather(held_out.labels, held_out.classes)  # type: ignore[union-attr]  # evaluated
        if trainer.rank:
            return
        training, rows = len(trainer.training), trainer.state.rows
        page = run_page(trainer.out, trainer.config, training, held_out, results, rows)
        try:
            write_page(page, trainer.out / PAGE)
        except OSError as error:
            logger.warning("cannot write %s: %s", trainer.out / PAGE, error.strerror or error)
        else:
            logger.info("results: %s", trainer.out / PAGE)
