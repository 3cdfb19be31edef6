"""One self-contained HTML page: the paper's tables, growth and comparison plots, and an attention explorer.

The page loads no other file and needs no network: it contains the pictures and the attention weights of every block,
one byte each. ``report.html`` and ``explorer.html`` in this folder are its Jinja templates.
"""

from __future__ import annotations

import base64
import io
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.attention_input import RANDOM, describe_weights, read_image, read_model, to_input
from hatnet_analysis.attention_maps import AttentionWeights, record_weights, rollout
from hatnet_analysis.figures import compare_figure, growth_figure
from hatnet_analysis.flops import count_params
from hatnet_analysis.growth import growth, summary
from hatnet_analysis.models import check_name
from hatnet_analysis.paper import check_libraries, table_rows
from hatnet_analysis.tables import SECTIONS, TABLES, render
from hatnet_analysis.throughput import COMPARED, Settings, checked_device, compare
from hatnet_core.io import atomic_write

SIZE = 224
"""Height and width in pixels that the explorer's image is scaled to for the model.

A multiple of every stage's stride: the explorer assumes that the positions of each map divide the image evenly.
"""

SHOWN = (448, 896)
"""Shortest and longest longer side in pixels of the image that the explorer shows, in its own aspect ratio."""

EXPLORED = "hatnet_tiny"
"""Model of the explorer, with random weights, where no other is given."""

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
    *,
    pretrained: bool = False,
) -> Path:
    """Measure, and write ``index.html``.

    Args:
        out: folder, created if it is missing, and kept only if the page is written.
        sections: names of :data:`hatnet_analysis.tables.SECTIONS`.
        tables: of the section ``tables``, as for :func:`hatnet_analysis.paper.table_rows`.
        image: for the explorer; drawn shapes by default.
        checkpoint: for the explorer, with ``variant`` as for :func:`hatnet_analysis.attention_input.read_model`.
        variant: :data:`EXPLORED` if both are None.
        device: for growth, comparison and the table ``memory``; the rest is counted or computed on a CPU.
        progress: called with one line before each piece of work.
        pretrained: for the explorer, the released weights of ``variant``.

    Returns:
        The path of the page. A failed report leaves the former page.

    Raises:
        ValueError: before anything is measured, if a section or table is unknown, the folder or page cannot be
            written, or image, checkpoint or device are refused.
        FileNotFoundError: if image or checkpoint is missing.
        ImportError: if timm or hatnet-dense, which build the peers, is not installed; before anything is measured.
    """
    for what, wanted, known in (("section", sections, SECTIONS), ("table", tables, TABLES)):
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {unknown[0]!r}")
    checked_device(device)
    check_libraries(tables if "tables" in sections else ())
    for name in COMPARED if "compare" in sections else ():
        check_name(name)
    picture = _drawn_shapes() if image is None else read_image(image)
    variant = variant if checkpoint or variant else EXPLORED
    explored = read_model(checkpoint, variant, pretrained=pretrained)  # before hours of work
    weights = describe_weights(checkpoint and Path(checkpoint.name), variant, pretrained=pretrained)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "tables": lambda: {"tables": _tables({TABLES[name]: table_rows(name, progress, device) for name in tables})},
        "complexity": lambda: _complexity(device, progress),
        "compare": lambda: _compare(device, progress),
        "attention": lambda: _explorer(picture, explored, weights, progress),
    }
    template = Environment(loader=PackageLoader(__package__, "."), autoescape=True).get_template("report.html")
    with _page_in(out) as part:
        made = {name: makers[name]() for name in SECTIONS if name in sections}
        page = template.render(about=_about(device), titles=SECTIONS, sections=made)
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
                raise ValueError(f"{folder}: cannot write a report to this folder: {error}") from error
            if path.is_dir():
                raise ValueError(f"{path}: must be a file that the report replaces, got a folder")
            yield part
    except BaseException:  # also Ctrl-C
        for parent in made:
            with suppress(OSError):  # not made, or no longer empty
                parent.rmdir()
        raise


def _about(device: str) -> str:
    machine = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    return (
        f"Written by hatnet-analysis {__version__} with PyTorch {torch.__version__} on Python "
        f"{platform.python_version()}; measured on {machine}. All weights are random, unless others are named."
    )


def _tables(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    return {title: render(rows, "html") for title, rows in tables.items()}


def _complexity(device: str, progress: Progress) -> dict[str, Any]:
    rows = growth(device=device, progress=progress)
    figure = _drawn(growth_figure(rows))
    return {"figure": figure, "alt": "growth of four attentions with the image", "tables": _tables(summary(rows))}


def _compare(device: str, progress: Progress) -> dict[str, Any]:
    rows = compare(COMPARED, Settings(device=device), progress)
    figure = _drawn(compare_figure(rows))
    return {"figure": figure, "alt": "top-1 over FLOPs and over speed", "tables": _tables({"": rows})}


def _drawn(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _url(buffer.getvalue(), "image/png")


def _url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _explorer(picture: Image.Image, explored: Any, weights: str, progress: Progress) -> dict[str, Any]:
    model, (mean, std) = explored
    progress("attention weights of every block")
    recorded = record_weights(model, to_input(picture, (SIZE, SIZE), mean, std))
    buffer = io.BytesIO()
    longer = max(picture.size)
    scale = min(max(longer, SHOWN[0]), SHOWN[1]) / longer
    picture.resize([max(1, round(scale * side)) for side in picture.size]).save(buffer, format="JPEG", quality=88)
    blocks = [
        {"stage": i + 2, "block": j, **_packed(weights)}
        for i, stage in enumerate(recorded)
        for j, weights in enumerate(stage)
    ]
    data = {"image": _url(buffer.getvalue(), "image/jpeg"), "blocks": blocks, "rollout": _packed_rollout(recorded)}
    params = f"{count_params(model) / 1e6:.1f} M parameters"
    about = {"weights": weights, "random": weights.startswith(RANDOM), "params": params}
    return {"explorer": {**about, "data": data}, "tables": {}}


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
    """Pack the rollout from every position of the last map."""
    first, last = recorded[0][-1], recorded[-1][-1]
    shares = torch.stack(
        [rollout(recorded, (row, column)).flatten() for row in range(last.height) for column in range(last.width)]
    )
    return {"from": [last.height, last.width], "to": [first.height, first.width], "shares": _rows(shares)}


def _rows(values: Tensor) -> dict[str, str]:
    """Pack each row as one byte per value between its smallest and its largest, and these two."""
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scaled = (255 * (values - low) / (high - low).clamp_min(1e-30)).round().to(torch.uint8)
    ranges = torch.cat([low, high], -1).float().contiguous()
    return {"values": _base64(scaled), "ranges": _base64(ranges.view(torch.uint8))}


def _base64(values: Tensor) -> str:
    return base64.b64encode(bytes(values.flatten().tolist())).decode()


def _drawn_shapes() -> Image.Image:
    """Draw four shapes of different colours on a gradient."""
    image = Image.linear_gradient("L").resize((SHOWN[0], SHOWN[0])).convert("RGB")
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 50, 170, 180), fill="#d1495b")
    draw.rectangle((260, 60, 400, 170), fill="#edae49")
    draw.polygon([(110, 250), (40, 400), (190, 400)], fill="#00798c")
    draw.ellipse((270, 260, 390, 410), fill="#f5f5f5")
    return image
