"""One self-contained HTML page: the paper's tables, growth and comparison plots, and an attention explorer.

The page asks for no other file and no network; pictures are inside, and so are the attention weights of every block,
one byte each. ``report.html`` and ``explorer.html`` beside this file are its templates.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.attention_maps import AttentionWeights, read_image, read_model, record_weights, rollout, to_input
from hatnet_analysis.figures import compare_figure, growth_figure
from hatnet_analysis.growth import crossings, exponents, growth
from hatnet_analysis.paper import table_rows
from hatnet_analysis.tables import render
from hatnet_analysis.throughput import COMPARED, Settings, checked_device, compare

SECTIONS = ("tables", "complexity", "compare", "attention")

SIZE = 224
"""Side of the explorer's image in pixels."""

Progress = Callable[[str], None]


def write_report(
    out: Path,
    sections: Sequence[str] = SECTIONS,
    tables: Sequence[str] = ("1", "2", "3", "4", "6", "eq15", "memory"),
    image: Path | None = None,
    checkpoint: Path | None = None,
    variant: str | None = None,
    device: str = "cpu",
    progress: Progress = lambda text: None,
) -> Path:
    """Measure, and write ``index.html``.

    Args:
        out: folder, made if it is not there.
        sections: out of :data:`SECTIONS`.
        tables: of the section ``tables``, as for :func:`hatnet_analysis.paper.table_rows`.
        image: for the explorer; drawn shapes by default.
        checkpoint: for the explorer, as for :func:`hatnet_analysis.attention_maps.read_model`.
        variant: likewise; HAT-Net-Tiny with random weights if both are None.
        device: for the measurements.
        progress: takes one line before each piece of work.

    Returns:
        The path of the page; it is whole or not there.

    Raises:
        ValueError: if a section is unknown, or image, checkpoint or device are refused.
    """
    unknown = sorted(set(sections) - set(SECTIONS))
    if unknown:
        raise ValueError(f"unknown section {unknown[0]!r}; expected one of {', '.join(SECTIONS)}")
    checked_device(device)
    picture = _drawn_shapes() if image is None else read_image(image)
    explored = read_model(checkpoint, variant if checkpoint or variant else "hatnet_tiny")  # before hours of work
    path, part = out / "index.html", out / f".index.html.{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise ValueError(f"the report needs a folder that can be made and written, got {out}: {error}") from error
    part.unlink()
    makers: dict[str, tuple[str, Callable[[], str]]] = {
        "tables": ("The paper's tables", lambda: _tables(tables, device, progress)),
        "complexity": ("Growth with the image", lambda: _complexity(device, progress)),
        "compare": ("Speed", lambda: _compare(device, progress)),
        "attention": ("Attention explorer", lambda: _explorer(picture, explored, checkpoint, progress)),
    }
    wanted = [name for name in SECTIONS if name in sections]
    parts = {name: f'<section id="{name}"><h2>{makers[name][0]}</h2>{makers[name][1]()}</section>' for name in wanted}
    contents = "".join(f'<a href="#{name}">{makers[name][0]}</a>' for name in wanted)
    page = _filled("report.html", about=_about(device), contents=contents, sections="\n".join(parts.values()))
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _about(device: str) -> str:
    what = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    text = (
        f"Written by hatnet-analysis {__version__} with PyTorch {torch.__version__} on Python "
        f"{platform.python_version()}; measured on {what}. All weights are random unless a checkpoint is named."
    )
    return html.escape(text)


def _tables(tables: Sequence[str], device: str, progress: Progress) -> str:
    titles = {"eq15": "Eq. 5 and Eq. 15", "memory": "Sec. 4.4: memory of SiLU and GELU"}
    parts = []
    for table in tables:
        rows = table_rows(table, progress, device)
        parts.append(f"<h3>{titles.get(table, f'Table {table}')}</h3>{_table(rows)}")
    return "".join(parts)


def _complexity(device: str, progress: Progress) -> str:
    rows = growth(device=device, progress=progress)
    named = [row for row in crossings(rows) if row["crossing"] is not None]
    parts = [_figure(growth_figure(rows), "growth of four attentions with the image"), _table(rows)]
    parts += ["<h3>Power of the number of pixels, between the two largest sizes</h3>", _table(exponents(rows))]
    return "".join([*parts, "<h3>From where on the first is the dearer one</h3>", _table(named)])


def _compare(device: str, progress: Progress) -> str:
    rows = compare(COMPARED, Settings(device=device), progress)
    return _figure(compare_figure(rows), "top-1 over FLOPs and over speed") + _table(rows)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    return f'<div class="scroll">{render(rows, "html")}</div>'


def _figure(figure: Any, what: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return f'<img class="figure" alt="{what}" src="{_url(buffer.getvalue(), "image/png")}">'


def _url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _explorer(picture: Image.Image, explored: Any, checkpoint: Path | None, progress: Progress) -> str:
    model, (mean, std) = explored
    progress("attention weights of every block")
    recorded = record_weights(model, to_input(picture, (SIZE, SIZE), mean, std))
    buffer = io.BytesIO()
    picture.resize((2 * SIZE, 2 * SIZE)).save(buffer, format="JPEG", quality=88)
    blocks = [
        {"stage": i + 2, "block": j, **_packed(weights)}
        for i, stage in enumerate(recorded)
        for j, weights in enumerate(stage)
    ]
    data = {"image": _url(buffer.getvalue(), "image/jpeg"), "blocks": blocks, "rollout": _packed_rollout(recorded)}
    weights = "random weights" if checkpoint is None else f"the weights of {checkpoint.name}"
    about = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {weights}."
    return _filled("explorer.html", model=html.escape(about), data=json.dumps(data).replace("<", "\\u003c"))


def _packed(weights: AttentionWeights) -> dict[str, Any]:
    return {
        "height": weights.height,
        "width": weights.width,
        "heads": weights.global_.shape[0],
        "grid": weights.grid,
        "pool": weights.pool_size,
        "local": None if weights.local is None else _rows(weights.local),
        "global": _rows(weights.global_),
    }


def _packed_rollout(recorded: Sequence[Sequence[AttentionWeights]]) -> dict[str, Any]:
    """Rollout from every position of the last map."""
    first, last = recorded[0][-1], recorded[-1][-1]
    shares = torch.stack(
        [rollout(recorded, (row, column)).flatten() for row in range(last.height) for column in range(last.width)]
    )
    return {"from": [last.height, last.width], "to": [first.height, first.width], "shares": _rows(shares)}


def _rows(values: Tensor) -> dict[str, str]:
    """Each row as one byte a value between its smallest and its largest, and these two."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scaled = (255 * (values - low) / (high - low).clamp_min(1e-30)).round().to(torch.uint8)
    ranges = torch.cat([low, high], -1).float().contiguous()
    return {"values": _base64(scaled), "ranges": _base64(ranges.view(torch.uint8))}


def _base64(values: Tensor) -> str:
    return base64.b64encode(bytes(values.flatten().tolist())).decode()


def _drawn_shapes() -> Image.Image:
    """A picture without an origin: four shapes of different colours on a gradient."""
    image = Image.linear_gradient("L").resize((2 * SIZE, 2 * SIZE)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 50, 170, 180), fill="#d1495b")
    draw.rectangle((260, 60, 400, 170), fill="#edae49")
    draw.polygon([(110, 250), (40, 400), (190, 400)], fill="#00798c")
    draw.ellipse((270, 260, 390, 410), fill="#f5f5f5")
    return image


def _filled(template: str, **values: str) -> str:
    text = files("hatnet_analysis").joinpath(template).read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text
