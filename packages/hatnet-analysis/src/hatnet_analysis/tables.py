"""Rows of results as dataclasses, printed as a table, Markdown, HTML or JSON.

A field declares its own column (:func:`column`). JSON has every field and the exact numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any

from tabulate import tabulate

TABLES = {
    **{number: f"Table {number}" for number in "12346"},
    "eq15": "Eq. 5 and Eq. 15, one block per stage, 224×224",
    "memory": "Sec. 4.4, memory of SiLU and GELU",
}
"""Tables of :func:`hatnet_analysis.paper.table_rows`, and their titles."""

SECTIONS = {
    "tables": "The paper's tables",
    "complexity": "Growth with the image",
    "compare": "Speed",
    "attention": "Attention explorer",
}
"""Sections of the page of :func:`hatnet_analysis.report.write_report`, and their titles."""

FORMATS = {"table": "simple", "markdown": "github", "html": "html"}
"""tabulate's name of each format for reading."""

RENAMED = {"dearer": "slower", "cheaper": "faster", "h_mhsa_macs_completed": "h_mhsa_macs_padded"}  # prose: old keys
"""Former keys of rows, which :class:`Row` still takes."""


def column(
    heading: str | None = None,
    unit: float = 1.0,
    digits: int | None = None,
    *,
    shown: bool = True,
    optional: bool = False,
    default: Any = MISSING,
) -> Any:
    """Declare a field of a row with its column.

    Args:
        heading: title of the column with its unit; the field's name by default.
        unit: divisor of the values.
        digits: number of digits after the point; None prints a value unchanged.
        shown: whether readers see the column; otherwise it is only in the JSON.
        optional: whether the JSON omits the field where it is None.
        default: of the field.
    """
    keys = {"heading": heading, "unit": unit, "digits": digits, "shown": shown, "optional": optional}
    return field(default=None if optional else default, metadata=keys)


def megabytes(heading: str, default: Any = MISSING) -> Any:
    """Declare a field in bytes that is shown in megabytes."""
    return column(f"{heading} (MB)", 1e6, 0, default=default)


def hidden(default: Any = MISSING) -> Any:
    """Declare a field that is only in the JSON."""
    return column(shown=False, default=default)


@dataclass(kw_only=True)
class Row(Mapping[str, Any]):
    """One result; its fields are the keys of its JSON, and it reads as a mapping of them."""

    def __getitem__(self, key: str) -> Any:
        key = RENAMED.get(key, key)
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (f.name for f in fields(self) if not f.metadata.get("optional") or getattr(self, f.name) is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass(kw_only=True)
class ParamsRow(Row):
    """Parameters of a model or a part of it."""

    model: str
    part: str | None = column(optional=True)
    params: int = column("params (M)", 1e6, 2)


@dataclass(kw_only=True)
class FlopsRow(Row):
    """FLOPs of a model or a part of it, in the two conventions of ``flops.py``."""

    model: str
    part: str | None = column(optional=True)
    height: int
    width: int
    flops_paper: int = column("FLOPs, paper (G)", 1e9, 2)
    flops_complete: int = column("FLOPs, complete (G)", 1e9, 2)


@dataclass(kw_only=True)
class AttendedRow(Row):
    """One of the largest attention weights of a point."""

    step: str
    row: int
    column: int
    weight: float = field(metadata={"digits": 4})


def render(rows: Sequence[Mapping[str, Any]], style: str) -> str:
    """Format rows of one kind as ``json`` or one of :data:`FORMATS`; readers see no column without a value."""
    if style == "json":
        return json.dumps(rows, indent=2, default=dict)
    declared: dict[str, Field[Any]] = {f.name: f for f in fields(rows[0])} if rows and is_dataclass(rows[0]) else {}
    hide = {name for name, f in declared.items() if not f.metadata.get("shown", True)}
    known = declared or dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in known if key not in hide and any(row.get(key) is not None for row in rows)]
    table = [[_text(row.get(key), declared.get(key)) for key in keys] for row in rows]
    headings = [_metadata(declared.get(key)).get("heading") or key.replace("_", " ") for key in keys]
    right = [any(isinstance(row.get(key), int | float) for row in rows) for key in keys]
    align = ["right" if is_number else "left" for is_number in right]
    return tabulate(table, headings, FORMATS[style], colalign=align if rows else None, disable_numparse=True)


def render_titled(tables: Mapping[str, Sequence[Mapping[str, Any]]], style: str) -> str:
    """Render tables for readers, each below its title."""
    return "\n\n".join(f"{title}\n\n{render(rows, style)}" for title, rows in tables.items())


def _metadata(declared: Field[Any] | None) -> Mapping[str, Any]:
    return declared.metadata if declared else {}


def _text(value: Any, declared: Field[Any] | None) -> str:
    digits = _metadata(declared).get("digits")
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join(_text(item, None) for item in value)
    if isinstance(value, str | bool) or (isinstance(value, int) and digits is None):
        return str(value)
    return f"{value:g}" if digits is None else f"{value / _metadata(declared).get('unit', 1):.{digits}f}"
