"""Record measurements of hatnet-analysis on this machine: the paper's tables, growth of attention, speed of peers.

Writes OUT/<date>-analysis-<measurement>.json, a readable .md and, of all but ``paper``, a picture of the same name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from report import machine, versions

from hatnet_analysis.figures import compare_figure, growth_figure, save_figure
from hatnet_analysis.growth import crossings, exponents, growth
from hatnet_analysis.paper import table_rows
from hatnet_analysis.tables import TABLES, render
from hatnet_analysis.throughput import COMPARED, Settings, compare

PACKAGES = ("hatnet-core", "hatnet-analysis", "torch", "timm", "fvcore", "mmdet", "mmsegmentation")

Tables = dict[str, Sequence[Mapping[str, Any]]]


def main() -> int:
    """Run the chosen measurements, each with files of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chosen", nargs="*", metavar="MEASUREMENT", help=f"any of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.chosen) - set(MEASUREMENTS):
        parser.error(f"no measurement {sorted(unknown)[0]}; expected any of {', '.join(MEASUREMENTS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    for name in args.chosen or MEASUREMENTS:
        stem = args.out / f"{date}-analysis-{name}"
        header = {"date": date, "command": f"python benchmarks/analysis.py {name}"}
        header |= {"machine": machine(), "versions": versions(PACKAGES)}
        tables = MEASUREMENTS[name](stem.with_suffix(".png"))
        record = header | ({"rows": tables[""]} if "" in tables else tables)
        text = json.dumps(record, indent=1, ensure_ascii=False, default=dict)
        stem.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        stem.with_suffix(".md").write_text(_markdown(name, header, tables, stem.with_suffix(".png")), encoding="utf-8")
        print(f"wrote {stem}.json and {stem}.md")
    return 0


def _paper(_: Path) -> Tables:
    return {"": [row for table in TABLES for row in table_rows(table, _progress)]}


def _growth(picture: Path) -> Tables:
    rows = growth(progress=_progress)
    save_figure(growth_figure(rows), picture)
    return {"growth": rows, "exponents": exponents(rows), "crossings": crossings(rows)}


def _compare(picture: Path) -> Tables:
    rows = compare(COMPARED, Settings(), _progress)
    save_figure(compare_figure(rows), picture)
    return {"": rows}


MEASUREMENTS: dict[str, Callable[[Path], Tables]] = {"paper": _paper, "growth": _growth, "compare": _compare}


def _markdown(name: str, header: dict[str, Any], tables: Tables, picture: Path) -> str:
    parts = [
        f"# {name.capitalize()}, measured on {header['date']}",
        f"`{header['command']}`",
        "\n".join(f"- {key}: {value}" for key, value in header["machine"].items()),
        ", ".join(f"{key} {number}" for key, number in header["versions"].items()),
    ]
    for title, rows in tables.items():
        groups = dict.fromkeys(row.get("table", "") for row in rows)
        for group in groups:
            heading = f"Table {group}" if group.isdecimal() else group or title
            parts += [f"## {heading}"] * bool(heading)
            parts.append(render([row for row in rows if row.get("table", "") == group], "markdown"))
    if picture.exists():
        parts.append(f"![{name}]({picture.name})")
    return "\n\n".join(parts) + "\n"


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
