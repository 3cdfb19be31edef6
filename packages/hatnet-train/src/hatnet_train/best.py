"""Callbacks that follow the best epoch of a run: its weights as a file, and the end of a run that gets no better.

Both decide by the metrics of all epochs, which every rank has and every checkpoint contains: all ranks agree, and so
does a resumed run.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hatnet_core.checkpoint import WEIGHTS
from hatnet_core.io import atomic_write
from hatnet_train.callbacks import Callback
from hatnet_train.run.checkpoint import folder_name
from hatnet_train.run.state import AVERAGE, BEST

if TYPE_CHECKING:
    from hatnet_train.trainer import Trainer

logger = logging.getLogger(__name__)


class Best(NamedTuple):
    """Best epoch of a run."""

    epoch: int
    """Counted from 1."""

    top1: float
    file: str
    """Name of its better weights in a checkpoint: those of the optimizer, or their moving average."""


def best_epoch(rows: Sequence[dict[str, Any]]) -> Best:
    """Find the epoch of the highest held-out top-1, of equal ones that of the lowest loss, then the first.

    Args:
        rows: metrics of one epoch or more, see :meth:`hatnet_train.trainer.Trainer.epoch`.
    """
    kinds = {"": WEIGHTS, "ema_": AVERAGE}
    measured = [
        (row[f"{kind}top1"], -row[f"{kind}eval_loss"], -row["epoch"], file)
        for row in rows
        for kind, file in kinds.items()
        if f"{kind}top1" in row
    ]
    top1, _, epoch, file = max(measured)
    return Best(-epoch, top1, file)


class BestWeights(Callback):
    """Keep the weights of the best epoch as ``best.safetensors``, copied from its checkpoint.

    Call it after :class:`~hatnet_train.callbacks.Checkpointing`.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Make up for a copy that a killed process did not make."""
        if trainer.rank == 0 and trainer.state.rows and trainer.origin is not None:
            if trainer.origin.name == folder_name(trainer.state.step, evaluated=True):  # not after a later restart
                self._keep(trainer, trainer.origin)
            earlier = trainer.origin.parent.parent / BEST
            if earlier.is_file() and not (trainer.out / BEST).exists():
                self._copy(earlier, trainer.out / BEST)

    def after_epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Keep the weights of this epoch if it is the best so far."""
        if trainer.rank == 0:
            name = folder_name(trainer.state.step, evaluated=True)
            self._keep(trainer, trainer.out / "checkpoints" / name)

    def after_run(self, trainer: Trainer) -> None:
        """Log the best epoch."""
        best = best_epoch(trainer.state.rows)
        average = " by the average of the weights" if best.file == AVERAGE else ""
        logger.info("best epoch %d: top-1 %.2f %%%s, in %s", best.epoch, best.top1, average, trainer.out / BEST)

    def _keep(self, trainer: Trainer, checkpoint: Path) -> None:
        best = best_epoch(trainer.state.rows)
        if best.epoch == len(trainer.state.rows):
            self._copy(checkpoint / best.file, trainer.out / BEST)

    def _copy(self, source: Path, target: Path) -> None:
        try:
            with atomic_write(target) as part:
                shutil.copyfile(source, part)
        except OSError as error:  # such as a full disk, on which the checkpoint could not be saved either
            logger.warning("cannot write %s: %s; training continues", target, error.strerror or error)


class EarlyStopping(Callback):
    """End a run after so many epochs without a better one.

    Args:
        epochs: how many; 0 never ends it.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_start(self, trainer: Trainer) -> None:
        """End a resumed run that had ended."""
        self._stop(trainer)

    def after_epoch(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """End the run if no epoch was better for long enough."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        rows = trainer.state.rows
        if not rows or not self.epochs or len(rows) >= trainer.epochs:
            return
        if len(rows) - (best := best_epoch(rows)).epoch >= self.epochs:
            logger.info("stopping early: no epoch after %d was better (--early-stopping %d)", best.epoch, self.epochs)
            trainer.stop()
