"""The files of a benchmark: what was measured, on what machine, with which versions."""

from __future__ import annotations

import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from results import Measurement


class Report:
    """The files of one run of this program.

    Args:
        out: their folder; made if it is not there.
        subject: what is measured, the name of the program.
        part: the measurements of this run, if it is a part of all; they are in the files' names.
        packages: whose versions the numbers depend on.
        quick: whether it is only a try; then that is in the names, too.
    """

    def __init__(
        self, out: Path, subject: str, part: Sequence[str], packages: Sequence[str], *, quick: bool = False
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        self._subject = subject
        self._stem = out / "-".join([date, subject, *part, *["quick"] * quick])
        self._measured: dict[str, Measurement] = {}
        self._seconds: dict[str, float] = {}
        command = " ".join([f"python benchmarks/{subject}.py", *part, *["--quick"] * quick])
        self._header = {"date": date, "command": command, "machine": machine(), "versions": versions(packages)}

    def path(self, ending: str) -> Path:
        """Return the file of this ending."""
        return self._stem.with_name(self._stem.name + ending)

    def add(self, name: str, measure: Callable[[], Measurement]) -> Measurement:
        """Measure, print, and write all that there is so far; what was measured now."""
        start = time.perf_counter()
        self._measured[name] = measure()
        self._seconds[name] = round(time.perf_counter() - start, 1)
        print(f"\n{self._measured[name].title} ({self._seconds[name]:.0f} s)\n\n{self._measured[name].markdown()}\n")
        records = {key: {"seconds": self._seconds[key], **it.record()} for key, it in self._measured.items()}
        text = json.dumps({**self._header, "measurements": records}, indent=1, ensure_ascii=False)
        self.path(".json").write_text(text + "\n")
        self.path(".md").write_text(self._markdown())
        return self._measured[name]

    def _markdown(self) -> str:
        header, machine_ = self._header, self._header["machine"]
        parts = [
            f"# {self._subject.capitalize()}, measured on {header['date']}",
            f"`{header['command']}`",
            "\n".join(f"- {name}: {value}" for name, value in machine_.items()),
            ", ".join(f"{name} {number}" for name, number in header["versions"].items()),
        ]
        for name, measurement in self._measured.items():
            parts += [f"## {measurement.title}", measurement.markdown()]
            picture = self.path(f"-{name}.png")
            if picture.exists() and measurement.not_measured is None:
                parts.append(f"![{measurement.title}]({picture.name})")
            parts.append(f"Took {self._seconds[name]:.0f} s.")
        return "\n\n".join(parts) + "\n"


def machine() -> dict[str, Any]:
    """Describe the hardware, and how busy it was before this program."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": f"{memory / 2**30:.0f} GiB",
        "GPU": ", ".join(gpus) or "none",
        "system": f"{platform.system()} {platform.release()}",
        "load before the run": f"{os.getloadavg()[0]:.2f} (one minute's average; 0 is a quiet machine)",
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and of some packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _processor() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
