"""The pictures of hatnet-analysis, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hatnet_analysis.growth import CONTENDERS, DIM

if TYPE_CHECKING:
    from PIL.Image import Image

    from hatnet_analysis.attention_maps import View

COLOURS = {
    "MHSA": "#666666",
    "spatial reduction (PVT)": "#d95f02",
    "H-MHSA": "#1b6ca8",
    "window (Swin)": "#5a9e3a",
}
HAT_NET = COLOURS["H-MHSA"]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, PNG or SVG; the file is whole or not there."""
    part = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        figure.savefig(part, dpi=150)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def growth_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Log-log plots over the side of the image: multiply-adds, time and memory; points are measured, lines formulas.

    A line of multiply-adds is its formula; one of time or memory is its formula, scaled so as to pass through the
    largest measured point.

    Args:
        rows: of :func:`hatnet_analysis.growth.growth`.
    """
    figure = new_figure(13, 4.6)
    panels = figure.subplots(1, 3)
    _panel(panels[0], rows, "measured_macs", lambda row: row["macs"], "multiply-adds (G), Eq. 5 and 15", 1e9)
    _panel(panels[1], rows, "seconds_fused", lambda row: row["macs"], "time (s), fused attention")
    _panel(panels[2], rows, "memory_materialised", _values, "peak memory (MB), attention weights materialised", 1e6)
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _values(row: dict[str, Any]) -> float:
    """What has to be held, in values: the weights before and after the softmax, and some maps of C channels."""
    return float(2 * row["weights"] + 5 * row["height"] * row["width"] * DIM)


def _panel(axes: Any, rows: Sequence[dict[str, Any]], measured: str, line: Any, title: str, unit: float = 1.0) -> None:
    for contender in CONTENDERS:
        own = [row for row in rows if row["attention"] == contender.name]
        points = [(row["size"], row[measured] / unit) for row in own if row[measured]]
        largest = next((row for row in reversed(own) if row[measured]), None)
        if largest is None:
            continue
        scale = 1 / unit if measured == "measured_macs" else largest[measured] / unit / line(largest)
        colour, sizes = COLOURS[contender.name], [row["size"] for row in own]
        axes.plot(sizes, [scale * line(row) for row in own], color=colour, label=contender.name, linewidth=1.4)
        axes.plot([size for size, _ in points], [value for _, value in points], "o", color=colour, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row["size"] for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("side of the image (pixels)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)


def compare_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Top-1 as the papers state it over FLOPs (complete) and over measured throughput; HAT-Net is one joined line.

    Args:
        rows: of :func:`hatnet_analysis.throughput.compare`.
    """
    figure = new_figure(12, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, unit, label in (
        (panels[0], "flops_complete", 1e9, "FLOPs (G), complete"),
        (panels[1], "images_per_second", 1.0, "images a second, measured"),
    ):
        shown = [row for row in rows if row["paper_top1"] is not None]
        ours = [row for row in shown if row["model"].startswith("hatnet_")]
        peers = [row for row in shown if row not in ours]
        axes.plot([r[key] / unit for r in ours], [r["paper_top1"] for r in ours], "o-", color=HAT_NET)
        axes.plot([r[key] / unit for r in peers], [r["paper_top1"] for r in peers], "s", color="#999999", markersize=5)
        for row in shown:
            colour = HAT_NET if row in ours else "#555555"
            name = row["model"].removeprefix("timm/").replace("_patch4_window7_224", "")
            place = (row[key] / unit, row["paper_top1"])
            axes.annotate(name, place, (4, 4), textcoords="offset points", fontsize=7.5, color=colour)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.margins(x=0.14)
    panels[0].set_ylabel("ImageNet top-1 (%), as the papers state it")
    return figure


def attention_figure(image: Image, view: View) -> Figure:
    """The image with the point and its grid, then local, global and rolled-out attention drawn over it.

    Args:
        image: as read.
        view: of :func:`hatnet_analysis.attention_maps.look`.
    """
    at = view.attention
    figure = new_figure(16, 16 / 5 * image.height / image.width + 0.35)
    panels = figure.subplots(1, 5)
    cell = (image.height / at.height, image.width / at.width)
    local = torch.full((at.height, at.width), torch.nan)
    title = "no local step in stage 5"
    if at.local is not None:
        local[at.top : at.top + at.local.shape[0], at.left : at.left + at.local.shape[1]] = at.local
        title = f"local step: its grid of {at.local.shape[0]}×{at.local.shape[1]}"
    spread = at.global_.repeat_interleave(at.pool_size, 0).repeat_interleave(at.pool_size, 1)[: at.height, : at.width]
    head = "mean of the heads" if view.head is None else f"head {view.head}"
    maps = [
        (None, f"stage {view.stage}, block {view.block}, {head}"),
        (local, title),
        (spread, f"global step: {at.global_.shape[0]}×{at.global_.shape[1]} pooled positions"),
        (view.rollout, "rollout from the point"),
        (view.mean_rollout, "rollout, mean of all positions"),
    ]
    for axes, (values, heading) in zip(panels, maps, strict=True):
        axes.imshow(image, extent=(0, image.width, image.height, 0))
        if values is not None:
            axes.imshow(image.convert("L"), cmap="gray", extent=(0, image.width, image.height, 0))
            axes.imshow(
                values.numpy(),
                cmap="inferno",
                alpha=0.65,
                extent=(0, image.width, image.height, 0),
                interpolation="nearest",
            )
        axes.plot(*view.point, "+", color="#00e5ff", markersize=12, markeredgewidth=2)
        axes.set_title(heading, fontsize=9)
        axes.set_axis_off()
    if at.local is not None:
        corner = (at.left * cell[1], at.top * cell[0])
        _frame(panels[0], corner, at.local.shape[1] * cell[1], at.local.shape[0] * cell[0])
    return figure


def _frame(axes: Any, corner: tuple[float, float], width: float, height: float) -> None:
    axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="#00e5ff", linewidth=1.5))
