"""Files of predictions: CSV, JSON lines, or a page of pictures, chosen by the suffix."""

from __future__ import annotations

import base64
import contextlib
import csv
import html
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

from PIL import Image

from hatnet_core.images import to_rgb
from hatnet_core.io import atomic_write

Row: TypeAlias = Mapping[str, Any]
"""A result of :func:`hatnet_train.predict.predictions`."""

THUMBNAIL = 192
"""Longest side in pixels of a picture on the page: some 8 KB each."""

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Predictions</title><style>
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }
body { margin: 1.5rem; background: Canvas; color: CanvasText }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 12px }
figure { margin: 0; padding: 8px; border: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); border-radius: 8px }
img { width: 100%; height: 160px; object-fit: contain; display: block }
figcaption b, figcaption small, td { overflow-wrap: anywhere }
figcaption div { display: flex; justify-content: space-between; gap: 8px }
meter { display: block; width: 100%; height: 6px; margin-bottom: 4px }
small { opacity: .75 }
th, td { text-align: left; padding: 2px 16px 2px 0 }
</style></head><body><h1>Predictions</h1><main>
"""


def write_predictions(path: Path, rows: Iterable[Row]) -> int:
    """Write predictions to a file, row by row; return their number.

    Rows of CSV and JSON lines are in the file at once, so that those so far remain whatever ends the process. A page
    replaces the file at the end. Without a single row, nothing is written.

    Args:
        path: ends in ``.csv``, ``.jsonl`` or ``.html``.
        rows: results of :func:`hatnet_train.predict.predictions`, all with as many classes.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        return 0
    count = 0
    with _FORMATS[path.suffix](path, first) as write:
        for row in _chain(first, rows):
            write(row)
            count += 1
    return count


def _chain(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


@contextlib.contextmanager
def _csv(path: Path, first: Row) -> Iterator[Callable[[Row], None]]:
    numbers = range(1, len(first["classes"]) + 1) if len(first["classes"]) > 1 else [""]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"{name}{n}" for n in numbers for name in ("class", "probability"))])

        def write(row: Row) -> None:
            pairs = zip(row["classes"], row["probabilities"], strict=True)
            writer.writerow([row["image"], *(value for name, p in pairs for value in (name, f"{p:.6g}"))])
            file.flush()

        yield write


@contextlib.contextmanager
def _json_lines(path: Path, first: Row) -> Iterator[Callable[[Row], None]]:
    with path.open("w", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        yield write


@contextlib.contextmanager
def _page(path: Path, first: Row) -> Iterator[Callable[[Row], None]]:
    counts: Counter[str] = Counter()
    with atomic_write(path) as part, part.open("w", encoding="utf-8") as file:
        file.write(HEAD)

        def write(row: Row) -> None:
            counts[row["classes"][0]] += 1
            _write_figure(file, row)

        yield write
        lines = "".join(f"<tr><td>{html.escape(name)}<td>{n:,}" for name, n in counts.most_common())
        file.write(
            f"</main><h2>{counts.total():,} images</h2><table><tr><th>class<th>images{lines}</table></body></html>\n"
        )


def _write_figure(file: IO[str], row: Row) -> None:
    name = html.escape(row["image"])
    file.write(f'<figure><img alt="{name}" src="{_thumbnail(row["image"])}"><figcaption>')
    for place, (kind, p) in enumerate(zip(row["classes"], row["probabilities"], strict=True)):
        label = html.escape(kind) if place else f"<b>{html.escape(kind)}</b>"
        file.write(f'<div><span>{label}</span><span>{100 * p:.1f} %</span></div><meter value="{p:.4f}"></meter>')
    file.write(f"<small>{name}</small></figcaption></figure>\n")


def _thumbnail(path: str) -> str:
    """Small copy of an image as the address of a picture in a page."""
    with Image.open(path) as image:
        small = to_rgb(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_FORMATS = {".csv": _csv, ".jsonl": _json_lines, ".html": _page}
