"""Whether the files of a run folder are those that were written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hatnet_train import checkpoint

CONFIG = "config.json"


def check_run(run: Path) -> dict[Path, list[str]]:
    """Compare every file of a run with what was written.

    Args:
        run: the run folder.

    Returns:
        What is wrong with each checkpoint, the oldest first, and with the run folder's own files: config.json and, of
        a run that is done, those that its manifest lists.

    Raises:
        ValueError: if it is no run folder.
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
    """Whether a run came to its end: its manifest is written last, and removed when it goes on."""
    return (run / checkpoint.MANIFEST).exists()


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds.

    Raises:
        ValueError: if it cannot be read, or is none that :func:`run_record` made.
    """
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} has no config; expected the record of a run of hatnet-train")
    if not isinstance(record.get("resumed", []), list):
        raise ValueError(
            f"{path} has no list of how the run was resumed; expected the record of a run of hatnet-train"
        )
    return record
