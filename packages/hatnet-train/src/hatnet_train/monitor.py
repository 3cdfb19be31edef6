"""Reports of a run, by rank 0: progress, metrics.jsonl, TensorBoard and curves.png."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hatnet_core.io import atomic_write
from hatnet_train.curves import draw_curves
from hatnet_train.data.order import GlobalOrder

METRICS = "metrics.jsonl"

SECONDS_BETWEEN_LINES = 30.0
"""Seconds between lines of progress where the output is not a terminal."""


class Monitor:
    """Record one row of metrics per epoch in the run folder, as numbers and as a picture.

    A report that cannot be written does not end a run: it is warned about once, and the next epoch tries again.

    Args:
        out: the run folder; ``metrics.jsonl``, ``curves.png`` and ``tensorboard/`` appear in it.
        rows: metrics of earlier epochs of a resumed run; further rows in the files are removed.
        step: steps so far.
        classes: number of classes; of more than ten, the picture shows top-5.
    """

    def __init__(self, out: Path, rows: Sequence[dict[str, Any]], step: int, *, classes: int = 1000) -> None:
        self._out, self._classes = out, classes
        self._start, self._before = time.perf_counter(), len(rows)
        self._warned = False
        self._tensorboard: SummaryWriter | None = None
        self._open_tensorboard(step)
        self._write(rows)

    def train_step(self, step: int, loss: float, lr: float) -> None:
        """Send the global loss and the learning rate of an optimizer step, counted from 1, to TensorBoard."""
        self._add(step, {"train/step_loss": loss, "train/lr": lr})

    def epoch(self, rows: Sequence[dict[str, Any]], epochs: int, step: int) -> None:
        """Record the metrics of the epoch that ended at ``step``, the last of ``rows``, everywhere, and print them."""
        row = rows[-1]
        self._write(rows)
        if self._tensorboard is None:
            self._open_tensorboard(step)
        self._add(row["epoch"], {f"epoch/{name}": value for name, value in row.items() if name != "epoch"}, flush=True)
        left = (time.perf_counter() - self._start) / (len(rows) - self._before) * (epochs - row["epoch"])
        ema = f" (average of the weights {row['ema_top1']:.2f} %)" if "ema_top1" in row else ""
        tqdm.write(
            f"epoch {row['epoch']}/{epochs}: train loss {row['train_loss']:.4f}, "
            f"held-out loss {row['eval_loss']:.4f}, top-1 {row['top1']:.2f} %{ema}, "
            f"{row['images_per_second']:.0f} images/s, data wait {100 * row['data_wait']:.0f} %, "
            f"{row['memory_gb']:.1f} GB, {_duration(left)} left",
            file=sys.stderr,
        )

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        if self._tensorboard is not None:
            with self._tolerant():
                self._tensorboard.close()

    def _open_tensorboard(self, step: int) -> None:
        folder = self._out / "tensorboard"
        with self._tolerant():
            folder.mkdir(exist_ok=True)  # not the run folder, which TensorBoard would make anew if it has vanished
            self._tensorboard = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def _add(self, step: int, scalars: Mapping[str, float], *, flush: bool = False) -> None:
        """Send scalars to TensorBoard, which writes in a thread: an error may come to light in a later call."""
        if self._tensorboard is None:
            return
        with self._tolerant():
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
            if flush:
                self._tensorboard.flush()

    def _write(self, rows: Sequence[dict[str, Any]]) -> None:
        with self._tolerant():
            with atomic_write(self._out / METRICS) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            if rows:
                draw_curves(rows, self._out / "curves.png", classes=self._classes)
            self._warned = False

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._tensorboard = None  # its thread has ended
            if not self._warned:
                self._warned = True
                reason = error.strerror or error
                warning = f"hatnet-train: warning: cannot report in {self._out}: {reason}; training continues"
                tqdm.write(warning, file=sys.stderr)


def _leave_to_caller(failed: threading.ExceptHookArgs) -> None:
    """Ignore errors of TensorBoard's thread, which the caller gets, too."""
    if not type(failed.thread).__module__.startswith("tensorboard"):
        _uncaught(failed)


_uncaught, threading.excepthook = threading.excepthook, _leave_to_caller


class Progress:
    """Progress of an epoch: a bar on a terminal, elsewhere a line every :data:`SECONDS_BETWEEN_LINES`.

    Args:
        epoch: counted from 0.
        epochs: of the run.
        order: the order of the images, which knows steps and batch size.
        done: steps of the epoch so far.
    """

    def __init__(self, epoch: int, epochs: int, order: GlobalOrder, done: int) -> None:
        self._name, self._total, self._batch_size = f"epoch {epoch + 1}/{epochs}", order.steps, order.batch_size
        self._bar = tqdm(
            total=order.steps, initial=done, desc=self._name, leave=False, disable=not sys.stderr.isatty()
        )
        self._start = self._spoke = time.perf_counter()
        self._first = self._done = done

    def step(self, loss: float, data_wait: float) -> None:
        """Count a step.

        Args:
            loss: NaN if the step was skipped.
            data_wait: share of the time spent waiting for data.
        """
        self._done += 1
        now = time.perf_counter()
        seconds = (now - self._start) / (self._done - self._first)
        rate = f"{self._batch_size / seconds:.0f} images/s"
        known = f"loss {loss:.4f}, {rate}" if loss == loss else rate  # a skipped step has none
        self._bar.set_postfix_str(known, refresh=False)
        self._bar.update()
        if self._bar.disable and now - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = now
            tqdm.write(
                f"{self._name}: step {self._done}/{self._total}, {known}, data wait {100 * data_wait:.0f} %, "
                f"{_duration(seconds * (self._total - self._done))} left of the epoch",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
