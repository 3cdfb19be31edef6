"""Interleaved measurements, ratios, and the JSON file that records them.

Speed is judged as a ratio of two contenders within one run. Every round runs all contenders, each round begins with
another one, and a ratio is formed within a round: what slows the machine for a while slows both sides.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Table:
    """Values by contender, one per round, in a unit; ``digits`` after the point are printed."""

    title: str
    unit: str
    rounds: Mapping[str, list[float]]
    digits: int = 1

    def record(self) -> dict[str, Any]:
        """Return the table for the JSON file."""
        values = {name: {"median": statistics.median(v), "rounds": v} for name, v in self.rounds.items()}
        return {"title": self.title, "unit": self.unit, "digits": self.digits, "values": values}


@dataclass(frozen=True)
class Ratio:
    """One contender over another in each round, and the target of the median, if there is one."""

    name: str
    rounds: list[float]
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """True if the median meets the target; None without one."""
        median = statistics.median(self.rounds)
        if self.at_least is not None:
            return median >= self.at_least
        return None if self.at_most is None else median <= self.at_most

    def record(self) -> dict[str, Any]:
        """Return the ratio for the JSON file."""
        target = "none" if self.at_most is None else f"at most {self.at_most:g}"
        target = target if self.at_least is None else f"at least {self.at_least:g}"
        median = statistics.median(self.rounds)
        return {"name": self.name, "median": median, "rounds": self.rounds, "target": target, "met": self.met}


@dataclass
class Measurement:
    """One section of a report: what was measured, with which settings, or the reason why it could not be."""

    title: str
    what: str
    settings: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    not_measured: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the section for the JSON file."""
        if self.not_measured is not None:
            return {"title": self.title, "not_measured": self.not_measured}
        return {
            "title": self.title,
            "what": " ".join(self.what.split()),
            "settings": self.settings,
            "tables": [table.record() for table in self.tables],
            "ratios": [ratio.record() for ratio in self.ratios],
            **({"rows": self.rows} if self.rows else {}),
        }


def interleaved(
    contenders: Mapping[str, Callable[[int], float]], rounds: int, what: str, *, warm_up: bool = False
) -> dict[str, list[float]]:
    """Run every contender once per round with a progress bar, and return what they return, by name.

    Args:
        contenders: functions by name, called with the number of the round; that of the warm-up is -1.
        rounds: number of rounds.
        what: name of the progress bar.
        warm_up: run a round first that does not count.
    """
    names = list(contenders)
    values: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=len(names) * (rounds + warm_up), desc=what, unit="turn") as bar:
        for number in range(-warm_up, rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                value = contenders[name](number)
                if number >= 0:
                    values[name].append(value)
                bar.update()
    return values


def quotients(above: list[float], below: list[float]) -> list[float]:
    """Divide round by round."""
    return [one / other for one, other in zip(above, below, strict=True)]


class Report:
    """The JSON file of one run, written after each measurement.

    Args:
        out: folder of the file; created if it is missing.
        subject: what is measured.
        chosen: measurements of this run, if not all of the subject; they are in the file's name.
        packages: packages whose versions are recorded.
        quick: mark the file as a smoke run.
    """

    def __init__(
        self, out: Path, subject: str, chosen: Sequence[str], packages: Sequence[str], *, quick: bool = False
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        self.file = out / ("-".join([date, subject, *chosen, *["quick"] * quick]) + ".json")
        self.content: dict[str, Any] = {
            "date": date,
            "command": " ".join(["python benchmarks/run.py", subject, *chosen, *["--quick"] * quick]),
            "machine": machine(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
            "measurements": {},
        }

    def add(self, name: str, measure: Callable[[], Measurement]) -> Measurement:
        """Measure, print, and write everything so far."""
        start = time.perf_counter()
        measurement = measure()
        record = {"seconds": round(time.perf_counter() - start, 1), **measurement.record()}
        self.content["measurements"][name] = record
        self.file.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\n{section(record)}\n")
        return measurement


def page(content: Mapping[str, Any], title: str) -> str:
    """Return a report as Markdown.

    Args:
        content: what :class:`Report` wrote; older reports of hatnet-analysis have their rows at the top.
        title: heading of the page.
    """
    header = ("date", "command", "machine", "versions", "measurements")
    rows = {key: value for key, value in content.items() if key not in header}
    measured = content.get("measurements") or {"": {"title": "", "rows": rows}}
    return "\n\n".join(
        [
            f"# {title}, measured on {content['date']}",
            f"`{content['command']}`",
            _list(content["machine"]),
            ", ".join(f"{name} {number}" for name, number in content["versions"].items()),
            *map(section, measured.values()),
        ]
    )


def section(record: Mapping[str, Any]) -> str:
    """Return one measurement of a report as Markdown."""
    parts = [f"## {record['title']}"] if record["title"] else []
    if "not_measured" in record:
        return "\n\n".join([*parts, f"Not measured: {record['not_measured']}."])
    parts += [record.get("what", ""), _list(record.get("settings", {}))]
    for table in record.get("tables", []):
        digits = table.get("digits", 2)
        lines = {name: [f"{number:.{digits}f}" for number in _spread(v)] for name, v in table["values"].items()}
        parts.append(_table([table["title"], f"{table['unit']} (median)", "lowest", "highest"], lines))
    if ratios := record.get("ratios"):
        verdicts = {True: "yes", False: "**no**", None: ""}
        lines = {r["name"]: [*(f"{n:.3f}" for n in _spread(r)), r["target"], verdicts[r["met"]]] for r in ratios}
        parts.append(_table(["ratio", "median", "lowest", "highest", "target", "met"], lines))
    for title, rows in record.get("rows", {}).items():
        for group in dict.fromkeys(str(row.get("table", "")) for row in rows):
            chosen = [row for row in rows if str(row.get("table", "")) == group]
            columns = [name for name in dict.fromkeys(key for row in chosen for key in row) if name != "table"]
            cells = [[_cell(row.get(name)) for name in columns] for row in chosen]
            level = "###" if record["title"] else "##"
            parts += [f"{level} {f'Table {group}' if group else title}", _grid(columns, cells)]
    return "\n\n".join(part for part in parts if part)


def _spread(record: Mapping[str, Any]) -> tuple[float, float, float]:
    return record["median"], min(record["rounds"]), max(record["rounds"])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _list(values: Mapping[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


def _table(columns: list[str], lines: Mapping[str, list[str]]) -> str:
    return _grid(columns, [[name, *cells] for name, cells in lines.items()])


def _grid(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def machine() -> dict[str, Any]:
    """Describe the hardware, and how busy it was before this program."""
    import torch  # pages are rendered without it

    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "GPU": ", ".join(gpus) or "none",
        "system": f"{platform.system()} {platform.release()}",
        "load before the run": f"{os.getloadavg()[0]:.2f} (one minute's average; 0 is a quiet machine)",
    }
