"""Rows as a table for reading, as Markdown, HTML or JSON. JSON has every key and the exact numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]

FORMATS = {"table": "simple", "markdown": "github", "html": "html"}
"""tabulate's name of each format for reading."""


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


@dataclass(frozen=True)
class Column:
    """How a value is shown to readers.

    Attributes:
        heading: above the column, with the unit.
        unit: what the value is divided by.
        digits: after the point; None for text and whole numbers.
    """

    heading: str
    unit: float = 1.0
    digits: int | None = None


def _megabytes(heading: str) -> Column:
    return Column(f"{heading} (MB)", 1e6, 0)


COLUMNS = {
    "params": Column("params (M)", 1e6, 2),
    "flops_paper": Column("FLOPs, paper (G)", 1e9, 2),
    "flops_complete": Column("FLOPs, complete (G)", 1e9, 2),
    "grid_size": Column("G1"),
    "pool_size": Column("G2"),
    "dim": Column("C"),
    "mhsa_macs": Column("Eq. 5, MHSA (M)", 1e6, 2),
    "h_mhsa_macs": Column("Eq. 15, H-MHSA (M)", 1e6, 2),
    "h_mhsa_macs_completed": Column("completed (M)", 1e6, 2),
    "h_mhsa_bound": Column("bound (M)", 1e6, 2),
    "measured_macs": Column("measured (M)", 1e6, 2),
    "macs": Column("multiply-adds (G)", 1e9, 3),
    "seconds_materialised": Column("time, materialised (s)", 1, 4),
    "seconds_fused": Column("time, fused (s)", 1, 4),
    "memory_materialised": _megabytes("memory, materialised"),
    "memory_fused": _megabytes("memory, fused"),
    "memory_formula": _megabytes("memory, formula"),
    "params_m": Column("#Param (M)", 1, 2),
    "paper_params_m": Column("the paper's"),
    "flops_g_paper_convention": Column("FLOPs, paper (G)", 1, 2),
    "flops_g_complete": Column("FLOPs, complete (G)", 1, 2),
    "paper_flops_g": Column("the paper's (G)"),
    "difference_params_m": Column("#Param, difference (M)", 1, 2),
    "difference_flops_g_paper_convention": Column("FLOPs, paper, difference (G)", 1, 2),
    "difference_flops_g_complete": Column("FLOPs, complete, difference (G)", 1, 2),
    "verdict_params": Column("#Param"),
    "verdict_flops": Column("FLOPs"),
    "difference_g_complete": Column("to the default, complete (G)", 1, 1),
    "paper_difference_g": Column("to the default, the paper's (G)", 1, 0),
    "images_per_second": Column("images/s", 1, 1),
    "images_per_second_lowest": Column("lowest", 1, 1),
    "images_per_second_highest": Column("highest", 1, 1),
    "latency_ms_p50": Column("p50 (ms)", 1, 1),
    "latency_ms_p95": Column("p95 (ms)", 1, 1),
    "latency_ms_p99": Column("p99 (ms)", 1, 1),
    "peak_memory": _megabytes("peak memory beyond weights, images and optimizer state"),
    "ratio": Column("ratio", 1, 2),
    "paper_top1": Column("top-1, the papers' (%)"),
    "peak_memory_gib": Column("peak memory (GiB)", 1, 3),
    "ratio_to_silu": Column("to SiLU", 1, 3),
    "paper_memory_gb_batch_128": Column("the paper's, batch 128 (GB)"),
    "paper_ratio_to_silu": Column("the paper's, to SiLU", 1, 3),
    "weight": Column("weight", 1, 4),
    "power_of_macs": Column("multiply-adds", 1, 2),
    "power_of_seconds_fused": Column("time, fused", 1, 2),
    "power_of_memory_fused": Column("memory, fused", 1, 2),
    "power_of_memory_materialised": Column("memory, materialised", 1, 2),
    "crossing": Column("from this side on (pixels)", 1, 0),
    "between": Column("from a side between (pixels)"),
    "seconds": Column("time (s)", 1, 4),
}
"""How a key is shown; one that is not here is its own heading, underscores as spaces."""

HIDDEN = frozenset(
    {
        "table",
        "device",
        "mode",
        "dtype",
        "compile",
        "channels_last",
        "rounds",
        "ratio_lowest",
        "ratio_highest",
        "source",
        "paper_stages",
        "weights",
        "seconds_fused_lowest",
        "seconds_fused_highest",
        "seconds_materialised_lowest",
        "seconds_materialised_highest",
        "local",
        "global",
        "rollout",
        "top",
        "left",
    }
)
"""Keys that are only in the JSON: what is the same in every row, or too long for a table."""


def render(rows: Sequence[Row], style: str) -> str:
    """Rows in one of ``json`` and :data:`FORMATS`; for readers, without the columns that no row has a value in."""
    if style == "json":
        return json.dumps(rows, indent=2)
    shown = dict.fromkeys(key for row in rows for key in row if key not in HIDDEN)
    keys = [key for key in shown if any(row.get(key) is not None for row in rows)]
    table = [[_text(key, row.get(key)) for key in keys] for row in rows]
    headings = [COLUMNS[key].heading if key in COLUMNS else key.replace("_", " ") for key in keys]
    right = [any(isinstance(row.get(key), int | float) for row in rows) for key in keys]
    align = ["right" if is_number else "left" for is_number in right]
    return tabulate(table, headings, FORMATS[style], colalign=align if rows else None, disable_numparse=True)


def render_titled(tables: Mapping[str, Sequence[Row]], style: str) -> str:
    """Render tables for readers, each below its title."""
    return "\n\n".join(f"{title}\n\n{render(rows, style)}" for title, rows in tables.items())


def _text(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    if isinstance(value, list):
        return ", ".join("-" if item is None else str(item) for item in value)
    column = COLUMNS.get(key, Column(key))
    if isinstance(value, str | bool):
        return str(value)
    if column.digits is None:
        return (
            f"{value:,}"
            if isinstance(value, int) and value >= 10**6
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )
    return f"{value / column.unit:.{column.digits}f}"
