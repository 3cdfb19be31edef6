"""Measure training on this machine: data loading, the cost of our loop, checkpoints, two processes, a GPU.

Writes OUT/<date>-training.json, a readable .md of the same name and, for the loader, a picture. Close all else that
runs: the ratios are formed within rounds, but a busy machine still spreads them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measure_checkpoint
import measure_engine
import measure_gpu
import measure_loader
import measure_scaling
import torch
from results import Measurement
from training_steps import leave_launch

NAMES = ("loader", "engine", "checkpoint", "scaling", "gpu")

PACKAGES = ("hatnet-core", "hatnet-train", "torch", "torchvision", "timm", "deepspeed", "pillow", "scikit-image")


def main() -> None:
    """Run the chosen measurements and write the report after each, so that none is lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chosen", nargs="*", metavar="MEASUREMENT", help=f"any of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a try of a few minutes, whose numbers mean nothing")
    args = parser.parse_args()
    if unknown := set(args.chosen) - set(NAMES):
        parser.error(f"no measurement {', '.join(sorted(unknown))}; expected any of {', '.join(NAMES)}")
    chosen = [name for name in NAMES if name in args.chosen] or list(NAMES)
    report = Report(args.out, chosen, quick=args.quick)
    for name in chosen:
        report.add(name, measurements(report, quick=args.quick)[name])
    leave_launch()
    print(f"\nwrote {report.path('.json')} and {report.path('.md')}")


def measurements(report: Report, *, quick: bool) -> dict[str, Callable[[], Measurement]]:
    """What runs each measurement."""
    picture = report.path("-loader.png")
    return {
        "loader": lambda: measure_loader.measure(measure_loader.QUICK if quick else measure_loader.Plan(), picture),
        "engine": lambda: measure_engine.measure(measure_engine.QUICK if quick else measure_engine.Plan()),
        "checkpoint": lambda: measure_checkpoint.measure(
            measure_checkpoint.QUICK if quick else measure_checkpoint.Plan()
        ),
        "scaling": lambda: measure_scaling.measure(measure_scaling.QUICK if quick else measure_scaling.Plan()),
        "gpu": lambda: measure_gpu.measure(measure_gpu.QUICK if quick else measure_gpu.Plan()),
    }


class Report:
    """The files of one run of this program.

    Args:
        out: their folder; made if it is not there.
        chosen: the measurements of this run; those of a run of less than all are in the files' names.
        quick: whether it is only a try; then that is in the names, too.
    """

    def __init__(self, out: Path, chosen: list[str], *, quick: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        part = [] if tuple(chosen) == NAMES else chosen
        self._stem = out / "-".join([date, "training", *part, *["quick"] * quick])
        self._measured: dict[str, Measurement] = {}
        self._seconds: dict[str, float] = {}
        words = ["python benchmarks/training.py", *(chosen if part else []), *["--quick"] * quick]
        self._header = {"date": date, "command": " ".join(words), "machine": machine(), "versions": versions()}

    def path(self, ending: str) -> Path:
        """The file of this ending."""
        return self._stem.with_name(self._stem.name + ending)

    def add(self, name: str, measure: Callable[[], Measurement]) -> None:
        """Measure, print, and write all that there is so far."""
        start = time.perf_counter()
        self._measured[name] = measure()
        self._seconds[name] = round(time.perf_counter() - start, 1)
        print(f"\n{self._measured[name].title} ({self._seconds[name]:.0f} s)\n\n{self._measured[name].markdown()}\n")
        records = {key: {"seconds": self._seconds[key], **it.record()} for key, it in self._measured.items()}
        text = json.dumps({**self._header, "measurements": records}, indent=1, ensure_ascii=False)
        self.path(".json").write_text(text + "\n")
        self.path(".md").write_text(self._markdown())

    def _markdown(self) -> str:
        header, machine_ = self._header, self._header["machine"]
        parts = [
            f"# Training, measured on {header['date']}",
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
    """The hardware, and how busy it was before this program."""
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


def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _processor() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
