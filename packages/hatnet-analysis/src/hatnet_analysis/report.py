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
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.attention_input import read_image, read_model, to_input
from hatnet_analysis.attention_maps import AttentionWeights, record_weights, rollout
from hatnet_analysis.figures import compare_figure, growth_figure
from hatnet_analysis.growth import growth, summary
from hatnet_analysis.models import check_name
from hatnet_analysis.paper import check_libraries, table_rows
from hatnet_analysis.tables import SECTIONS, TABLES, render
from hatnet_analysis.throughput import COMPARED, Settings, checked_device, compare
from hatnet_core.io import atomic_write

SIZE = 224
"""Height and width in pixels that the explorer's image is scaled to for the model.

A multiple of every stage's stride: the explorer takes it that the positions of each map divide the image evenly.
"""

SHOWN = 448
"""Longer side in pixels of the image that the explorer shows, in its own aspect ratio."""

Progress = Callable[[str], None]


def write_report(
    out: Path,
    sections: Sequence[str] = tuple(SECTIONS),
    tables: Sequence[str] = tuple(TABLES),
    image: Path | None = None,
    checkpoint: Path | None = None,
    variant: str | None = None,
    device: str = "cpu",
    progress: Progress = lambda text: None,
) -> Path:
    """Measure, and write ``index.html``.

    Args:
        out: folder, made if it is not there, and kept only if the page is written.
        sections: out of :data:`hatnet_analysis.tables.SECTIONS`.
        tables: of the section ``tables``, as for :func:`hatnet_analysis.paper.table_rows`.
        image: for the explorer; drawn shapes by default.
        checkpoint: for the explorer, as for :func:`hatnet_analysis.attention_input.read_model`.
        variant: likewise; HAT-Net-Tiny with random weights if both are None.
        device: for growth, comparison and the table ``memory``; the rest is counted or computed on a CPU.
        progress: takes one line before each piece of work.

    Returns:
        The path of the page. Unless it is whole, what was there before stays.

    Raises:
        ValueError: if a section or table is unknown, the folder or the page cannot be written, or image, checkpoint
            or device are refused; all of that before anything is measured.
        FileNotFoundError: if there is no such image or checkpoint.
        ImportError: if timm or hatnet-dense, which peers come from, is not installed, likewise.
    """
    for what, wanted, known in (("section", sections, SECTIONS), ("table", tables, TABLES)):
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise ValueError(f"unknown {what} {unknown[0]!r}; expected one of {', '.join(known)}")
    checked_device(device)
    check_libraries(tables if "tables" in sections else ())
    for name in COMPARED if "compare" in sections else ():
        check_name(name)
    picture = _drawn_shapes() if image is None else read_image(image)
    explored = read_model(checkpoint, variant if checkpoint or variant else "hatnet_tiny")  # before hours of work
    makers: dict[str, Callable[[], str]] = {
        "tables": lambda: _tables(tables, device, progress),
        "complexity": lambda: _complexity(device, progress),
        "compare": lambda: _compare(device, progress),
        "attention": lambda: _explorer(picture, explored, checkpoint, progress),
    }
    wanted = [name for name in SECTIONS if name in sections]
    with _page_in(out) as part:
        parts = [f'<section id="{name}"><h2>{SECTIONS[name]}</h2>{makers[name]()}</section>' for name in wanted]
        contents = "".join(f'<a href="#{name}">{SECTIONS[name]}</a>' for name in wanted)
        page = _filled("report.html", about=_about(device), contents=contents, sections="\n".join(parts))
        part.write_text(page, encoding="utf-8", errors="replace")
    return out / "index.html"


@contextmanager
def _page_in(folder: Path) -> Iterator[Path]:
    """Write ``index.html`` of a folder atomically; after an error, remove the folders made for it.

    Raises:
        ValueError: if the folder cannot be made or written in, or ``index.html`` is a folder.
    """
    path = folder / "index.html"
    made: list[Path] = []
    try:
        with ExitStack() as stack:
            try:
                made += [parent for parent in (folder, *folder.parents) if not parent.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                part = stack.enter_context(atomic_write(path))
            except OSError as error:
                reason = f"the report needs a folder that can be made and written, got {folder}"
                raise ValueError(f"{reason}: {error}") from error
            if path.is_dir():
                raise ValueError(
                    f"the report is written to {path}, which is a folder; expected a file or nothing there"
                )
            yield part
    except BaseException:  # also Ctrl-C
        for parent in made:
            with suppress(OSError):  # not made, or no longer empty
                parent.rmdir()
        raise


def _about(device: str) -> str:
    what = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    text = (
        f"Written by hatnet-analysis {__version__} with PyTorch {torch.__version__} on Python "
        f"{platform.python_version()}; measured on {what}. All weights are random unless a checkpoint is named."
    )
    return html.escape(text)


def _tables(tables: Sequence[str], device: str, progress: Progress) -> str:
    return _titled({TABLES[table]: table_rows(table, progress, device) for table in tables})


def _complexity(device: str, progress: Progress) -> str:
    rows = growth(device=device, progress=progress)
    return _figure(growth_figure(rows), "growth of four attentions with the image") + _titled(summary(rows))


def _compare(device: str, progress: Progress) -> str:
    rows = compare(COMPARED, Settings(device=device), progress)
    return _figure(compare_figure(rows), "top-1 over FLOPs and over speed") + _table(rows)


def _titled(tables: dict[str, list[dict[str, Any]]]) -> str:
    return "".join(f"<h3>{title}</h3>{_table(rows)}" for title, rows in tables.items())


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
    scale = SHOWN / max(picture.size)
    picture.resize([max(1, round(scale * side)) for side in picture.size]).save(buffer, format="JPEG", quality=88)
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
    image = Image.linear_gradient("L").resize((SHOWN, SHOWN)).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 50, 170, 180), fill="#d1495b")
    draw.rectangle((260, 60, 400, 170), fill="#edae49")
    draw.polygon([(110, 250), (40, 400), (190, 400)], fill="#00798c")
    draw.ellipse((270, 260, 390, 410), fill="#f5f5f5")
    return image


def _filled(template: str, **values: str) -> str:
    """A template with what stands for each ``{{name}}`` in it; braces inside of a value are left alone."""
    text = files("hatnet_analysis").joinpath(template).read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: values[found[1]], text)
