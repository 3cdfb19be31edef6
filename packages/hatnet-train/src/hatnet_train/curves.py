"""Curves of a run over its epochs: ``curves.png``, and the same as SVG for a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hatnet_core.io import atomic_write

MANY_CLASSES = 10
"""Most classes without a curve of top-5, which is close to 100 % then."""

LOG_RANGE = 20.0
"""Ratio of the largest loss to the smallest from which the axis is logarithmic."""

Rows: TypeAlias = Sequence[Mapping[str, Any]]

INK = "#010203"
"""Colour of text and axes in an SVG, a rare one, which :func:`curves_svg` replaces by that of the reader's theme."""

THEME = "<style>:root{color:#222}@media(prefers-color-scheme:dark){:root{color:#ddd}}</style>"


def best_epoch(rows: Rows) -> Mapping[str, Any]:
    """Return the row of the highest top-1, the last of equal ones, as the checkpoint that is kept."""
    return max(reversed(rows), key=lambda row: float(row["top1"]))


def draw_curves(rows: Rows, path: Path, *, classes: int = 1000) -> None:
    """Draw losses and held-out accuracies over the epochs; the file is replaced as a whole.

    Args:
        rows: metrics of the epochs: ``epoch``, ``train_loss``, ``eval_loss``, ``top1`` and ``top5`` (percent), and,
            with a moving average of the weights, ``ema_top1``.
        path: the PNG file.
        classes: number of classes; top-5 is shown if there are more than ten.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_losses(left, rows)
    _draw_accuracies(right, rows, classes)
    with atomic_write(path) as part:
        figure.savefig(part, dpi=130, format="png")


def curves_svg(rows: Rows, *, classes: int = 1000) -> list[str]:
    """Draw losses and held-out accuracies as two SVG documents that follow the reader's light or dark theme."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    inked: tuple[Any, ...] = (
        "text.color",
        "axes.edgecolor",
        "axes.labelcolor",
        "axes.titlecolor",
        "xtick.color",
        "ytick.color",
    )
    drawn = []
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hatnet", **dict.fromkeys(inked, INK)}):
        for draw in (_draw_losses, lambda axes, rows: _draw_accuracies(axes, rows, classes)):
            figure = Figure(figsize=(5, 3.4), layout="constrained")
            draw(figure.subplots(), rows)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            svg = buffer.getvalue().replace(INK, "currentColor")
            drawn.append(svg.replace("<defs>", f"<defs>{THEME}", 1))
    return drawn


def _draw_losses(axes: Any, rows: Rows) -> None:
    epochs = [row["epoch"] for row in rows]
    for name, label, colour in (("train_loss", "training", "#2f86c9"), ("eval_loss", "held out", "#d9730d")):
        axes.plot(epochs, [row[name] for row in rows], "o-", color=colour, markersize=3, label=label)
    losses = [row[name] for row in rows for name in ("train_loss", "eval_loss") if row[name] > 0]
    if losses and max(losses) > LOG_RANGE * min(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set(ylabel="cross entropy", title="Loss")
    _finish(axes, rows)


def _draw_accuracies(axes: Any, rows: Rows, classes: int) -> None:
    epochs, best = [row["epoch"] for row in rows], best_epoch(rows)
    shown = [("top1", "top-1", "#2f86c9"), ("ema_top1", "top-1, average of the weights", "#4f9d3f")]
    if classes > MANY_CLASSES:
        shown.insert(1, ("top5", "top-5", "#8a6fc9"))
    for name, label, colour in [line for line in shown if line[0] in rows[0]]:
        axes.plot(epochs, [row[name] for row in rows], "o-", color=colour, markersize=3, label=label)
    label = f"best: epoch {best['epoch']}, {best['top1']:.2f} %"
    axes.plot([best["epoch"]], [best["top1"]], "*", color="#d9730d", markersize=11, linestyle="", label=label)
    axes.set(ylabel="held-out accuracy (%)", title=f"Top-1 {rows[-1]['top1']:.2f} %")
    _finish(axes, rows)


def _finish(axes: Any, rows: Rows) -> None:
    axes.axvline(best_epoch(rows)["epoch"], color="#888888", linestyle=":", linewidth=1, zorder=0)
    axes.set(xlabel="epoch", xlim=(rows[0]["epoch"] - 0.5, rows[-1]["epoch"] + 0.5))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(color="#888888", alpha=0.3)
