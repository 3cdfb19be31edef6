"""What a run reports while it runs: progress, metrics.jsonl, TensorBoard and curves.png, all by rank 0."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from hatnet_train.sampler import GlobalOrder

SECONDS_BETWEEN_LINES = 30.0
"""How often a run whose output is not a terminal says how far it is."""


class Monitor:
    """Record one row of metrics an epoch in the run folder, as numbers and as a picture.

    Args:
        out: the run folder; ``metrics.jsonl``, ``curves.png`` and ``tensorboard/`` appear in it.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._rows: list[dict[str, Any]] = []
        self._tensorboard = SummaryWriter(str(out / "tensorboard"))
        self._start = time.perf_counter()

    def train_step(self, step: int, loss: float, lr: float) -> None:
        """Send the global loss and the learning rate of an optimizer step, counted from 1, to TensorBoard."""
        self._tensorboard.add_scalar("train/step_loss", loss, step)
        self._tensorboard.add_scalar("train/lr", lr, step)

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Record the metrics of a finished epoch everywhere, and print them; ``row["epoch"]`` counts from 1."""
        self._rows.append(row)
        with (self._out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in row.items():
            if name != "epoch":
                self._tensorboard.add_scalar(f"epoch/{name}", value, row["epoch"])
        self._tensorboard.flush()
        draw_curves(self._rows, self._out / "curves.png")
        left = (time.perf_counter() - self._start) / len(self._rows) * (epochs - row["epoch"])
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
        self._tensorboard.close()


class Progress:
    """How far an epoch is: a bar on a terminal, elsewhere a line every :data:`SECONDS_BETWEEN_LINES`.

    Args:
        epoch: counted from 0.
        epochs: of the run.
        order: the order of the images, which knows steps and batch size.
    """

    def __init__(self, epoch: int, epochs: int, order: GlobalOrder) -> None:
        self._order, self._name = order, f"epoch {epoch + 1}/{epochs}"
        self._bar = tqdm(total=order.steps, desc=self._name, leave=False, disable=not sys.stderr.isatty())
        self._start = self._spoke = time.perf_counter()
        self._steps = 0

    def step(self, loss: float, waited: float) -> None:
        """Another step is done; ``waited`` counts the seconds of this epoch that went into waiting for data."""
        self._steps += 1
        now = time.perf_counter()
        images_per_second = self._steps * self._order.batch_size / (now - self._start)
        rates = f"{images_per_second:.0f} images/s"
        known = f"loss {loss:.4f}, {rates}" if loss == loss else rates  # not a number until the ranks' first report
        self._bar.set_postfix_str(known, refresh=False)
        self._bar.update()
        if self._bar.disable and now - self._spoke > SECONDS_BETWEEN_LINES:
            self._spoke = now
            left = (now - self._start) / self._steps * (self._order.steps - self._steps)
            tqdm.write(
                f"{self._name}: step {self._steps}/{self._order.steps}, {known}, "
                f"data wait {100 * waited / (now - self._start):.0f} %, {_duration(left)} left of the epoch",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()


def peak_memory_gb() -> float:
    """Largest memory of this process so far in GB (10⁹ bytes): of its GPU, or resident without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw losses and held-out accuracies over the epochs; the file is replaced only when complete.

    Args:
        rows: metrics of the epochs: ``epoch``, ``train_loss``, ``eval_loss``, ``top1`` and ``top5`` (percent), and,
            with a moving average of the weights, ``ema_top1``.
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in [("train_loss", "training"), ("eval_loss", "held out")]:
        left.plot(epochs, [row[name] for row in rows], marker="o", markersize=3, label=label)
    left.set(xlabel="epoch", ylabel="cross entropy", yscale="log", title="Loss")
    labels = {"top1": "top-1", "top5": "top-5", "ema_top1": "top-1, average of the weights"}
    for name in [name for name in labels if name in rows[0]]:
        right.plot(epochs, [row[name] for row in rows], marker="o", markersize=3, label=labels[name])
    right.set(xlabel="epoch", ylabel="held-out accuracy (%)", title=f"Top-1 {rows[-1]['top1']:.2f} %")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    staged = path.with_name(f".{path.name}.tmp")
    figure.savefig(staged, dpi=130, format="png")
    staged.replace(path)
