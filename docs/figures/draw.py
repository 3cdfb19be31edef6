"""Draws the figures of the method page from the code itself: ``python docs/figures/draw.py [FOLDER]``.

What is coloured is what a gradient reaches, and the names and shapes in boxes are those that a forward pass meets, so
that no figure says what the code does not do. Each is drawn twice, for light and dark pages, always to the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor, nn

from hatnet_core import HATNet, create_model
from hatnet_core.attention import HierarchicalAttention, average_pool, grid_attention, token_attention

PALETTES = {
    "light": {"ink": "#24292f", "faint": "#b9c0c8", "paper": "#f3f4f6", "local": "#f0903d", "global": "#3f83c8"},
    "dark": {"ink": "#dfe3e8", "faint": "#5b636d", "paper": "#262a30", "local": "#e88c3c", "global": "#5a9bdc"},
}

SETTINGS = {"svg.hashsalt": "hatnet", "font.family": "DejaVu Sans", "font.size": 9.0}

SIDE, GRID, POOL = 28, 7, 4
"""Positions along a side, G1 and G2 of stage 3 at 224×224, which ``check_example`` compares with the model."""

QUERY = (9, 17)
"""Row and column of the position that looks."""

Palette = dict[str, str]


def check_example(model: HATNet) -> None:
    """Check that the numbers above are those of stage 3 of a model."""
    stage = model.forward_intermediates(torch.zeros(1, 3, 224, 224), indices=[1])[0]
    attention = model.stages[1].blocks[0].attn
    assert stage.shape[-2:] == (SIDE, SIDE)
    assert (attention.grid_size, attention.pool_size) == (GRID, POOL)


def seen_locally() -> Tensor:
    """[SIDE, SIDE] booleans: the positions whose keys and values the local step reads for the query."""
    qkv = torch.rand(1, 3 * 8, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    return _reached(grid_attention(qkv, 1, GRID), qkv)


def seen_globally() -> tuple[Tensor, Tensor]:
    """Booleans: the positions of the pooled map that the global step reads, and those of the map behind them."""
    a1 = torch.rand(1, 8, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    pooled = average_pool(a1, POOL)
    pooled.retain_grad()
    out = token_attention(1, torch.rand(1, 8, SIDE, SIDE, dtype=torch.float64), pooled.repeat(1, 2, 1, 1))
    behind = _reached(out, a1)
    return pooled.grad[0].abs().sum(0) > 0, behind


def _reached(out: Tensor, x: Tensor) -> Tensor:
    """[H, W] booleans: where ``x`` has a gradient of ``out`` at the query."""
    out[0, :, QUERY[0], QUERY[1]].square().sum().backward()
    return x.grad[0].abs().sum(0) > 0


def local_step(palette: Palette) -> Figure:
    """Return the keys of one position in the local step."""
    local = seen_locally()
    figure, axes = _panel(
        palette,
        "1. Inside its grid",
        f"{int(local.sum())} keys: the G1 × G1 = {GRID} × {GRID}\nof its own grid (Eq. 6-9)",
    )
    _cells(axes, [[palette["paper"]] * SIDE] * SIDE, 1)
    _cells(axes, _coloured(local, palette["local"]), 1)
    return _ruled(figure, axes, palette, GRID)


def global_step(palette: Palette) -> Figure:
    """Return the keys of one position in the global step."""
    pooled, _ = seen_globally()
    figure, axes = _panel(
        palette,
        "2. To the pooled map",
        f"{int(pooled.sum())} keys, each the mean of\nG2 × G2 = {POOL} × {POOL} (Eq. 10-13)",
    )
    _cells(axes, _coloured(pooled, palette["global"]), POOL)
    return _ruled(figure, axes, palette, POOL)


def both_steps(palette: Palette) -> Figure:
    """Return the positions that one position takes from in both steps."""
    local, (pooled, behind) = seen_locally(), seen_globally()
    figure, axes = _panel(
        palette,
        "Both steps",
        f"{int((local | behind).sum())} positions, the whole map,\nby {int(local.sum() + pooled.sum())} keys",
    )
    _cells(axes, _coloured(behind, palette["global"]), 1, alpha=0.6)
    _cells(axes, _coloured(local, palette["local"]), 1)
    return _ruled(figure, axes, palette, GRID)


def _panel(palette: Palette, title: str, text: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(2.8, 3.25))
    axes = figure.subplots()
    axes.text(SIDE / 2, -1, title, ha="center", va="bottom", color=palette["ink"], fontsize=11)
    axes.text(SIDE / 2, SIDE + 1, text, ha="center", va="top", color=palette["ink"])
    return figure, axes


def _ruled(figure: Figure, axes: Axes, palette: Palette, heavy: int) -> Figure:
    """Draw a panel with the lines of positions and, every ``heavy`` of them, of grids, and the query."""
    for step, color, width in [(1, palette["faint"], 0.25), (heavy, palette["ink"], 0.8)]:
        lines = [i * step for i in range(SIDE // step + 1)]
        axes.hlines(lines, 0, SIDE, color=color, lw=width)
        axes.vlines(lines, 0, SIDE, color=color, lw=width)
    axes.add_patch(Rectangle((QUERY[1], QUERY[0]), 1, 1, facecolor=palette["ink"], edgecolor="none"))
    axes.set_xlim(-0.5, SIDE + 0.5)
    axes.set_ylim(SIDE + 4.5, -3)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0)
    return figure


def _coloured(where: Tensor, color: str) -> list[list[str | None]]:
    return [[color if value else None for value in row] for row in where.tolist()]


def _cells(axes: Axes, colors: list[Any], side: float, alpha: float = 1.0) -> None:
    """Fill squares of ``side``, those of a row that are equal as one."""
    for y, row in enumerate(colors):
        for color, run in groupby(enumerate(row), key=lambda cell: cell[1]):
            x = [i for i, _ in run]
            if color is not None:
                box = Rectangle((x[0] * side, y * side), len(x) * side, side, alpha=alpha, lw=0)
                box.set_facecolor(color)
                axes.add_patch(box)


def layer_shapes(attention: HierarchicalAttention, side: int) -> dict[str, str]:
    """Return the output shape of each layer of the attention, by name, as ``C×H×W``."""
    shapes: dict[str, str] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, out: shapes.update({name: "×".join(map(str, out.shape[1:]))})

    hooks = [module.register_forward_hook(note(name)) for name, module in attention.named_children()]
    attention(torch.zeros(1, attention.qkv.in_channels, side, side))
    for hook in hooks:
        hook.remove()
    return shapes


def flow(palette: Palette) -> Figure:
    """Draw the layers of H-MHSA from top to bottom, with their names in code and the shapes that they give."""
    shapes = layer_shapes(create_model("hatnet_small").eval().stages[1].blocks[0].attn, SIDE)
    x = shapes["norm"]
    left, right = 3.1, 8.3
    figure = Figure(figsize=(6.2, 6.6))
    axes = figure.subplots()
    boxes = [
        (left, 0.0, "X", x, "", "paper"),
        (left, 1.3, "norm", shapes["norm"], "", "paper"),
        (left, 2.6, "qkv, 1×1", shapes["qkv"], "Eq. 7", "paper"),
        (left, 3.9, f"attention in {GRID}×{GRID} grids", x, "Eq. 6, 8", "local"),
        (left, 5.2, "+ X, grid_norm = A1", shapes["grid_norm"], "Eq. 9", "paper"),
        (right, 5.2, f"mean of {POOL}×{POOL}, pool_norm", shapes["pool_norm"], "Eq. 10", "paper"),
        (left, 6.5, "q, 1×1", shapes["q"], "Eq. 12", "paper"),
        (right, 6.5, "kv, 1×1", shapes["kv"], "Eq. 12", "paper"),
        (left, 7.8, "attention to the pooled map", x, "Eq. 11, 13", "global"),
        (left, 9.1, "+ A1, proj, 1×1", shapes["proj"], "Eq. 14", "paper"),
        (left, 10.4, "+ X, in the block", x, "Eq. 14", "paper"),
    ]
    for place in boxes:
        _box(axes, palette, *place)
    column = [y for place, y, *_ in boxes if place == left]
    for above, below in pairwise(column):
        _arrow(axes, palette, (left, above + 0.42), (left, below - 0.42))
    _arrow(axes, palette, (left + 2.3, 5.2), (right - 2.3, 5.2))
    _arrow(axes, palette, (right, 5.62), (right, 6.08))
    _path(axes, palette, [(right, 6.92), (right, 7.8), (left + 2.3, 7.8)])
    _path(axes, palette, [(left - 2.3, 0.0), (0.35, 0.0), (0.35, 5.2), (left - 2.3, 5.2)])
    _path(axes, palette, [(0.35, 5.2), (0.35, 10.4), (left - 2.3, 10.4)], from_=(0.35, 0.0))
    _path(axes, palette, [(left + 2.3, 5.35), (5.75, 5.35), (5.75, 9.1), (left + 2.3, 9.1)])
    axes.set_xlim(0, 10.9)
    axes.set_ylim(11, -0.6)
    axes.axis("off")
    figure.subplots_adjust(left=0, right=1, top=1, bottom=0)
    return figure


def _box(axes: Axes, palette: Palette, x: float, y: float, name: str, shape: str, note: str, kind: str) -> None:
    face = palette[kind]
    edge = palette["faint"] if kind == "paper" else face
    frame = FancyBboxPatch((x - 2.2, y - 0.33), 4.4, 0.66, boxstyle="round,pad=0.08", facecolor=face, edgecolor=edge)
    axes.add_patch(frame)
    ink = palette["ink"] if kind == "paper" else "#ffffff"
    axes.text(x, y - 0.13, name, ha="center", va="center", color=ink, fontsize=9.5, weight="bold")
    second = f"{note}    {shape}" if note else shape
    axes.text(x, y + 0.2, second, ha="center", va="center", color=ink, fontsize=7.5)


def _arrow(axes: Axes, palette: Palette, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": palette["ink"], "lw": 1.0})


def _path(
    axes: Axes, palette: Palette, corners: list[tuple[float, float]], from_: tuple[float, float] | None = None
) -> None:
    """Straight lines from corner to corner, with a head at the last."""
    points = [from_, *corners] if from_ else corners
    axes.plot([x for x, _ in points[:-1]], [y for _, y in points[:-1]], color=palette["ink"], lw=1.0)
    _arrow(axes, palette, points[-2], points[-1])


def drawn(folder: Path) -> Iterator[Path]:
    """Draw every figure into ``folder``."""
    check_example(create_model("hatnet_small").eval())
    for draw in (local_step, global_step, both_steps, flow):
        for theme, palette in PALETTES.items():
            with matplotlib.rc_context(SETTINGS):
                path = folder / f"{draw.__name__.replace('_', '-')}-{theme}.svg"
                draw(palette).savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
            yield path


if __name__ == "__main__":
    for file in drawn(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(file)
