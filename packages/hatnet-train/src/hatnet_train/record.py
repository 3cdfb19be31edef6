"""The run folder and what it records of how a run was made: config.json."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from hatnet_train.config import TrainConfig
from hatnet_train.launch import AgreedError
from hatnet_train.preflight import raise_together

PACKAGES = ("hatnet-core", "hatnet-train", "deepspeed", "torch", "torchvision", "timm", "numpy", "pillow")
"""Whose versions decide what a run computes."""


def open_run_folder(out: Path, record: dict[str, Any]) -> None:
    """Rank 0 makes the folder and writes config.json; what stops it is raised on every rank.

    Raises:
        AgreedError: if ``out`` already holds files, cannot be made, or is not the same folder for all ranks.
    """
    problem = None
    if dist.get_rank() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            if any(out.iterdir()):
                problem = f"run folder {out} is not empty; expected a new or empty folder for --out"
            else:
                (out / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            problem = f"cannot make run folder {out}: {error.strerror}; expected a writable path for --out"
    problems = [problem]
    dist.broadcast_object_list(problems, src=0)
    if problems[0] is not None:
        raise AgreedError(problems[0])
    seen = (out / "config.json").is_file()
    raise_together(None if seen else f"run folder {out} is not that of rank 0; expected storage that all hosts share")


def run_record(config: TrainConfig, settings: dict[str, Any], world_size: int) -> dict[str, Any]:
    """What config.json holds.

    Args:
        config: the run, with its seed.
        settings: DeepSpeed's configuration, a user's own in it.
        world_size: number of processes.
    """
    return {
        "config": dataclasses.asdict(config),
        "deepspeed_config": settings,
        "world_size": world_size,
        "command": sys.argv,
        "versions": versions(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the checkout that the code runs from, "-dirty" if it was changed; None if it is installed."""
    here = Path(__file__)
    try:
        if not _git(here.parent, "ls-files", here.name):  # installed below somebody else's checkout
            return None
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except FileNotFoundError:  # no git on this machine
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of :data:`PACKAGES` and of Python."""
    return {name: version(name) for name in PACKAGES} | {"python": sys.version.split()[0]}
