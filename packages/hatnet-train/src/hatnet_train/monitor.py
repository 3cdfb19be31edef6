"""What a run reports while it runs: metrics.jsonl, TensorBoard and curves.png, written by rank 0."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Record one row of metrics an epoch in the run folder, as numbers and as a picture.

    Args:
        out: the run folder; ``metrics.jsonl``, ``curves.png`` and ``tensorboard/`` appear in it.
    """

    def __init__(self, out: Path) -> None:
        self._out = out
        self._rows: list[dict[str, Any]] = []
        self._tensorboard = SummaryWriter(str(out / "tensorboard"))

    def train_step(self, step: int, loss: float, lr: float) -> None:
        """Send the global loss and the learning rate of an optimizer step, counted from 1, to TensorBoard."""
        self._tensorboard.add_scalar("train/step_loss", loss, step)
        self._tensorboard.add_scalar("train/lr", lr, step)

    def epoch(self, row: dict[str, Any]) -> None:
        """Append the metrics of a finished epoch everywhere; ``row["epoch"]`` counts from 1."""
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

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        self._tensorboard.close()


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw losses and held-out accuracies over the epochs; the file is replaced only when complete.

    Args:
        rows: metrics of the epochs: ``epoch``, ``train_loss``, ``eval_loss``, ``top1`` and ``top5`` (percent).
        path: the PNG file.
    """
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in [("train_loss", "training"), ("eval_loss", "held out")]:
        left.plot(epochs, [row[name] for row in rows], marker="o", markersize=3, label=label)
    left.set(xlabel="epoch", ylabel="cross entropy", yscale="log", title="Loss")
    for name, label in [("top1", "top-1"), ("top5", "top-5")]:
        right.plot(epochs, [row[name] for row in rows], marker="o", markersize=3, label=label)
    right.set(xlabel="epoch", ylabel="held-out accuracy (%)", title=f"Top-1 {rows[-1]['top1']:.2f} %")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    staged = path.with_name(f".{path.name}.tmp")
    figure.savefig(staged, dpi=130, format="png")
    staged.replace(path)
