"""Opening of a run folder, and its record of the run: config.json."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from deepspeed import comm as dist

from hatnet_core.io import atomic_write
from hatnet_train.config import TrainConfig
from hatnet_train.distributed.collectives import raise_together
from hatnet_train.distributed.errors import AgreedError
from hatnet_train.run import checkpoint
from hatnet_train.run.folder import CONFIG, read_config
from hatnet_train.run.state import differences

logger = logging.getLogger(__name__)

PACKAGES = ("hatnet-core", "hatnet-train", "deepspeed", "torch", "torchvision", "timm", "numpy", "pillow")
"""Packages whose versions decide the results of a run."""

LOCK = ".lock"

_LOCKS: list[IO[str]] = []  # open files hold the locks


def open_run_folder(out: Path, record: dict[str, Any], *, resume: bool) -> None:
    """Create the folder and config.json on rank 0; raise its error on every rank.

    Args:
        out: the run folder.
        record: of :func:`run_record`.
        resume: it contains this run already; its first record stays, ``record`` is added under ``resumed``.

    Raises:
        AgreedError: if ``out`` holds files of another run, cannot be made, is in use, or is not the same folder for
            all ranks.
    """
    problem = None
    if dist.get_rank() == 0:
        try:
            problem = _prepare(out, record, resume=resume)
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--out must be a writable folder, got {out}: {error.strerror}"
    problems = [problem]
    dist.broadcast_object_list(problems, src=0)
    if problems[0] is not None:
        raise AgreedError(problems[0])
    seen = (out / CONFIG).is_file()
    raise_together(None if seen else f"run folder {out} is not that of rank 0; expected storage that all hosts share")


def _prepare(out: Path, record: dict[str, Any], *, resume: bool) -> str | None:
    """Create or reopen the folder; return a problem or None."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / CONFIG
    unfinished = f".{CONFIG}."  # of a process that was killed while it wrote the file
    holds_files = any(p.name != LOCK and not p.name.startswith(unfinished) for p in out.iterdir())
    if holds_files and not resume:
        return f"run folder {out} is not empty; expected a new or empty folder for --out, or --resume auto"
    if holds_files and not path.is_file():
        return f"{out} holds files, but no {CONFIG}; expected a run folder of hatnet-train, or a new one, for --out"
    if not _lock(out / LOCK):
        return f"run folder {out} is in use by another run, which has to end first"
    if path.is_file():
        first = read_config(path)
        if not checkpoint.committed(out / "checkpoints") and (problem := _not_begun_alike(out, first, record)):
            return problem
        record = {**first, "resumed": [*first.get("resumed", []), record]}
    for left in (checkpoint.MANIFEST, *(p.name for p in out.glob(".*.tmp*"))):  # the run is no longer finished
        (out / left).unlink(missing_ok=True)
    with atomic_write(path) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    return None


def _not_begun_alike(out: Path, first: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Problem of starting a run again that left no checkpoint; None without one."""
    if (out / checkpoint.MANIFEST).exists():
        return f"{out} contains a finished run without checkpoints to resume from; use another --out"
    changes = differences(first["config"], first.get("data", {}), now["config"], now["data"])
    return f"cannot resume in {out}: {changes}; use the first values, or another --out" if changes else None


def _lock(path: Path) -> bool:
    """Take the folder for this process, until it ends in whatever way; False if another process has it."""
    lock = path.open("w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which data workers would inherit
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            lock.close()
            return False
        logger.warning("cannot lock %s: %s; let no other run use it", path, error.strerror, extra={"all_ranks": True})
    _LOCKS.append(lock)
    return True


def run_record(
    config: TrainConfig, settings: dict[str, Any], world_size: int, data: Mapping[str, str]
) -> dict[str, Any]:
    """Content of config.json.

    Args:
        config: the run, with its seed.
        settings: DeepSpeed's configuration, a user's own in it.
        world_size: number of processes.
        data: identifies its data.
    """
    return {
        "config": config.to_dict(),
        "data": dict(data),
        "deepspeed_config": settings,
        "world_size": world_size,
        "command": sys.argv,
        "versions": versions(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Return the commit of the checkout that the code is in, "-dirty" if it was changed; None if installed."""
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
