"""Run folder: its config.json, and the check of its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hatnet_train.records import convert, read_json
from hatnet_train.run import checkpoint

CONFIG = "config.json"


@dataclass(frozen=True)
class RunRecord:
    """Fields of ``run_record`` in every config.json; the rest depends on the release."""

    config: dict[str, Any]
    data: dict[str, str] = field(default_factory=dict)
    resumed: list[dict[str, Any]] = field(default_factory=list)


def values_of_run(path: Path) -> dict[str, Any]:
    """Values of a run by field name, those of the last time that it was resumed.

    Args:
        path: its config.json or its folder.

    Raises:
        ValueError: if it cannot be read, or is not the record of a run.
    """
    file = path / CONFIG if path.is_dir() else path
    record = read_config(file)
    newest = convert([record, *record.get("resumed", [])][-1], RunRecord, file)
    return newest.config


def check_run(run: Path) -> dict[Path, list[str]]:
    """Compare every file of a run with what was written.

    Args:
        run: the run folder.

    Returns:
        Problems of each checkpoint, the oldest first, and of the run folder's own files: config.json and, of a
        finished run, those that its manifest lists.

    Raises:
        ValueError: if it is not a run folder.
    """
    folders = [*reversed(checkpoint.committed(run / "checkpoints"))]
    if not folders and not (run / CONFIG).exists():
        raise ValueError(f"neither {CONFIG} nor checkpoints in {run}; expected a run folder of hatnet-train")
    found = {folder: list(checkpoint.check(folder)) for folder in folders}
    own = list(checkpoint.check(run)) if is_done(run) else []
    try:
        read_config(run / CONFIG)
    except ValueError as error:
        own.append(str(error))
    return {**found, run: own}


def is_done(run: Path) -> bool:
    """Return whether a run has finished: its manifest is written last, and removed when it resumes."""
    return (run / checkpoint.MANIFEST).exists()


def read_config(path: Path) -> dict[str, Any]:
    """Read all of a config.json.

    Raises:
        ValueError: if it cannot be read, or is none that :func:`run_record` made.
    """
    record = read_json(path, dict[str, Any])
    convert(record, RunRecord, path)
    return record
