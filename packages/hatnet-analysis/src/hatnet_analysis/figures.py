"""Figures of hatnet-analysis, drawn with matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from hatnet_analysis.attention_input import RANDOM
from hatnet_analysis.attention_maps import FIRST_STRIDE
from hatnet_analysis.growth import CONTENDERS, crossings, fastest_rate, points
from hatnet_core.io import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from hatnet_analysis.attention_maps import View
    from hatnet_analysis.growth import CrossingRow

COLOURS = {
    "MHSA": "#666666",
    "spatial reduction (PVT)": "#d95f02",
    "H-MHSA": "#1b6ca8",
    "window (Swin)": "#5a9e3a",
}
HAT_NET = COLOURS["H-MHSA"]

NAME_PLACES = tuple(
    ((side * x, y), "left" if side > 0 else "right")
    for near in (((5, 4), (5, -11)), ((8, -3), (5, 13), (5, -20)), ((5, 22), (5, -29)))
    for side in (1, -1)
    for x, y in near
)
"""Offsets of a name from its point in points of 1/72 inch, and which of its ends is there; the best first."""


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of ``width`` × ``height`` inches that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, PNG or SVG, atomically."""
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150)


def growth_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot multiply-adds, memory and time over the side of the image, log-log.

    Points are measured, lines are formulas. No line is fitted to its points. For time, one rate for all contenders and
    both ways turns multiply-adds into seconds, that of the fastest point. A diamond in two colours marks where the
    upper one begins to cost more: by the formulas for multiply-adds and memory, as measured for time.

    Args:
        rows: of :func:`hatnet_analysis.growth.growth`, or read from the JSON of a report.
    """
    figure = new_figure(13, 10)
    panels = figure.subplots(2, 2)
    _panel(panels[0, 0], rows, ("measured_macs", 1e9), ("macs", 1e9), "macs", "multiply-adds (G)")
    title, memory = "peak memory (MB), plain products", ("memory_formula", 1e6)
    _panel(panels[0, 1], rows, ("memory_materialised", 1e6), memory, "memory_formula", title)
    panels[1, 1].sharey(panels[1, 0])
    rate = fastest_rate(rows)
    for axes, quantity, way in (
        (panels[1, 0], "seconds_fused", "fused"),
        (panels[1, 1], "seconds_materialised", "plain products"),
    ):
        at_rate = "" if rate is None else f"; lines: multiply-adds at {rate / 1e9:.3g} G/s, the fastest point's rate"
        _panel(axes, rows, (quantity, 1.0), ("macs", rate), quantity, f"time (s), {way}{at_rate}")
    handles = [Line2D([], [], color=colour, marker="o", markersize=5, label=name) for name, colour in COLOURS.items()]
    label = "from this side on, the upper half's costs more"
    handles.append(Line2D([], [], linestyle="", marker="D", color="#888888", markersize=8, label=label))
    panels[0, 0].legend(
        handles=handles,
        frameon=False,
        fontsize=9,
        title="line: formula, point: measured",
        title_fontsize=9,
        alignment="left",
    )
    return figure


def _panel(
    axes: Any,
    rows: Sequence[Mapping[str, Any]],
    measured: tuple[str, float],
    formula: tuple[str, float | None],
    crossed: str,
    title: str,
) -> None:
    """Plot a measured quantity over a formula, each with its divisor, and mark the crossings of ``crossed``."""
    sizes = sorted({row["size"] for row in rows})
    sides = range(sizes[0], sizes[-1] + 1, 32)
    curves = {}
    for contender in CONTENDERS:
        dots = {size: value / measured[1] for size, value in points(rows, contender, measured[0]).items()}
        line = {side: contender.formula(formula[0], side) / formula[1] for side in sides} if formula[1] else {}
        colour = COLOURS[contender.name]
        axes.plot(list(line.keys()), list(line.values()), color=colour, linewidth=1.4)
        axes.plot(list(dots.keys()), list(dots.values()), "o", color=colour, markersize=5)
        curves[contender.name] = line if crossed == formula[0] else dots
    shown = [row for row in crossings(rows) if row["quantity"] == crossed and row["crossing"] is not None]
    inside = [row for row in shown if sizes[0] <= row["crossing"] <= sizes[-1]]
    for i, row in enumerate(sorted(inside, key=lambda row: float(row["crossing"]))):
        _mark(axes, row, curves[row["slower"]], (9, -14) if i == len(inside) - 1 else (-30, 6))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("side of the image (pixels)")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)


def _mark(axes: Any, crossing: CrossingRow, curve: dict[int, float], offset: tuple[int, int]) -> None:
    """Draw a diamond on the curve of the slower one, its upper half in that one's colour, its lower in the other's."""
    side, colours = float(crossing["crossing"]), (COLOURS[crossing.slower], COLOURS[crossing.faster])
    below, above = max(s for s in curve if s <= side), min(s for s in curve if s >= side)
    share = math.log(side / below) / math.log(above / below) if above > below else 0.0
    height = curve[below] ** (1 - share) * curve[above] ** share
    half = {"color": colours[0], "markerfacecoloralt": colours[1], "fillstyle": "top", "markeredgecolor": "black"}
    axes.plot([side], [height], "D", markersize=8, zorder=3, **half)
    back = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.annotate(f"{side:.0f}", (side, height), offset, textcoords="offset points", fontsize=9, bbox=back)


def compare_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the papers' top-1 over FLOPs (complete) and over measured throughput; one line joins HAT-Net.

    Args:
        rows: of :func:`hatnet_analysis.throughput.compare`, or read from the JSON of a report.
    """
    figure = new_figure(12, 4.8)
    panels = figure.subplots(1, 2, sharey=True)
    shown = [row for row in rows if row["paper_top1"] is not None]
    quantities = (
        ("flops_complete", 1e9, "FLOPs (G), complete"),
        ("images_per_second", 1.0, "images per second, measured"),
    )
    for axes, (key, unit, label) in zip(panels, quantities, strict=True):
        ours = [row for row in shown if row["model"].startswith("hatnet_")]
        peers = [row for row in shown if row not in ours]
        for group, name, style, colour in ((ours, "HAT-Net", "o-", HAT_NET), (peers, "peers", "s", "#999999")):
            places = [row[key] / unit for row in group], [row["paper_top1"] for row in group]
            axes.plot(*places, style, color=colour, markersize=5, label=name)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.margins(x=0.16, y=0.1)
    panels[0].set_ylabel("ImageNet top-1 (%), from the papers")
    panels[0].legend(loc="lower right", frameon=False, fontsize=9)
    figure.draw_without_rendering()  # lays the panels out, so that names can be placed in pixels
    for axes, (key, unit, _) in zip(panels, quantities, strict=True):
        _name_points(axes, [(row["model"], row[key] / unit, row["paper_top1"]) for row in shown])
    return figure


def _name_points(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Write each name, the upper ones first, at the first of :data:`NAME_PLACES` that is free, or the first of all.

    A free place covers no point, line or other name. adjustText puts names on their own points and across the line.
    """
    frame = axes.get_window_extent()
    covered = [point for line in axes.lines for point in _pixels(axes, line)]
    boxes = [] if axes.get_legend() is None else [axes.get_legend().get_window_extent()]
    for model, x, y in sorted(points, key=lambda point: -point[2]):
        name = model.removeprefix("timm/").replace("_patch4_window7_224", "")
        colour = HAT_NET if model.startswith("hatnet_") else "#555555"
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        options = {"textcoords": "offset points", "fontsize": 7.5, "color": colour, "arrowprops": leader}
        text = axes.annotate(name, (x, y), NAME_PLACES[0][0], **options)
        text.set_in_layout(False)  # a name must not move the panels that its place was computed for
        for place, side in (*NAME_PLACES, NAME_PLACES[0]):
            text.xyann = place
            text.set_horizontalalignment(side)
            text.get_window_extent()  # moves it to where it belongs
            box = Text.get_window_extent(text)  # without the leader
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(map(box.overlaps, boxes)) and not any(box.contains(*point) for point in covered):
                break
        boxes.append(box)


def _pixels(axes: Any, line: Line2D) -> list[tuple[float, float]]:
    """Return the points of a line in pixels, and, if they are joined, 100 more on each segment."""
    points = axes.transData.transform(line.get_xydata()).tolist()
    if line.get_linestyle() == "None":
        return [(x, y) for x, y in points]
    steps = [i / 100 for i in range(101)]
    return [(x + s * (u - x), y + s * (v - y)) for (x, y), (u, v) in pairwise(points) for s in steps]


def attention_figure(image: Image, view: View, weights: str = "") -> Figure:
    """Draw the image with the point and its grid, and local attention, global attention and rollout over it.

    A position covers the pixels that the model sees there: its stride in the model's input, scaled to the image. Each
    map has a colour bar of its own, from its smallest value to its largest. Stage 5 has no local step.

    Args:
        image: in its own size.
        view: of :func:`hatnet_analysis.attention_maps.look`.
        weights: whose weights they are, the title; of :func:`hatnet_analysis.attention_input.describe_weights`.
    """
    at = view.attention
    scale = (image.height / view.input_size[0], image.width / view.input_size[1])
    cell = (at.stride * scale[0], at.stride * scale[1])
    maps = _attention_maps(view, cell, (FIRST_STRIDE * scale[0], FIRST_STRIDE * scale[1]))
    head = "mean of the heads" if view.head is None else f"head {view.head}"
    headings = [f"stage {view.stage}, block {view.block}, {head}", *(heading for heading, *_ in maps)]
    panels, figure = _attention_panels(image, headings, weights)
    panels[0].imshow(image, extent=(0, image.width, image.height, 0))
    for axes, (_, values, (height, width), label) in zip(panels[1:], maps, strict=True):
        axes.imshow(image.convert("L"), cmap="gray", extent=(0, image.width, image.height, 0))
        extent = (0, values.shape[1] * width, values.shape[0] * height, 0)
        shown = axes.imshow(values.numpy(), cmap="inferno", alpha=0.65, extent=extent, interpolation="nearest")
        bar = figure.colorbar(shown, ax=axes, location="bottom", aspect=35, pad=0.02, ticks=MaxNLocator(4))
        bar.set_label(label, fontsize=9)
        bar.ax.tick_params(labelsize=9)
    for axes in panels:
        axes.set(xlim=(0, image.width), ylim=(image.height, 0))  # the last positions may reach beyond the image
        axes.plot(*view.point, "+", color="#00e5ff", markersize=12, markeredgewidth=2)
    if at.local is not None:
        left, top = at.left * cell[1], at.top * cell[0]
        width = min(at.local.shape[1] * cell[1], image.width - left)
        height = min(at.local.shape[0] * cell[0], image.height - top)
        panels[0].add_patch(Rectangle((left, top), width, height, fill=False, edgecolor="#00e5ff", linewidth=1.5))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    first, second = panels[0].get_position(), panels[1].get_position()
    panels[0].set_position((first.x0, second.y0, second.width, second.height))  # level, although it has no colour bar
    return figure


def _attention_maps(
    view: View, cell: tuple[float, float], first_cell: tuple[float, float]
) -> list[tuple[str, Tensor, tuple[float, float], str]]:
    """Return heading, values, height and width of a position in pixels, and label of the colours, of every map."""
    at, maps = view.attention, []
    if at.local is not None:
        local = torch.full((at.height, at.width), torch.nan)
        local[at.top : at.top + at.local.shape[0], at.left : at.left + at.local.shape[1]] = at.local
        heading = f"local step: its grid of {at.local.shape[0]}×{at.local.shape[1]}"
        maps.append((heading, local, cell, "attention weight"))
    spread = at.global_.repeat_interleave(at.pool_size, 0).repeat_interleave(at.pool_size, 1)[: at.height, : at.width]
    pooled = "" if at.pool_size == 1 else "pooled "
    heading = f"global step: {at.global_.shape[0]}×{at.global_.shape[1]} {pooled}positions"
    return [
        *maps,
        (heading, spread, cell, "attention weight"),
        ("rollout from the point", view.rollout, first_cell, "share of the position"),
        ("rollout, mean of all positions", view.mean_rollout, first_cell, "share of the position"),
    ]


def _attention_panels(image: Image, headings: Sequence[str], title: str) -> tuple[list[Any], Figure]:
    """Create a panel for each heading, as wide as its heading needs: at most three in a row, of wide images two."""
    columns = 2 if len(headings) == 4 or image.width > 1.9 * image.height else 3
    rows = -(-len(headings) // columns)
    width = 12 / columns
    figure = new_figure(12, rows * (min(width * image.height / image.width, 2 * width) + 0.9) + 0.4 * bool(title))
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in panels:
        axes.set_axis_off()
    for axes, heading in zip(panels, headings, strict=False):
        axes.set_title(textwrap.fill(heading, int(11 * width)), fontsize=11)
    if title:
        colour = "#b3261e" if title.startswith(RANDOM) else "black"
        figure.suptitle(textwrap.fill(title, 100), fontsize=13, fontweight="bold", color=colour)
    for axes in panels[len(headings) :]:
        axes.remove()
    return panels[: len(headings)], figure
