"""Checkpoints on disk, written and read atomically.

A checkpoint is a folder ``step-0000001250`` below ``checkpoints/``. It is written into a hidden folder next to it,
every file flushed to the disk and listed with its size and SHA-256 in ``manifest.json``, and renamed only then:
whatever ends the process, and whenever, a folder with that name is complete. Nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from hatnet_core.io import atomic_write, sync_folder
from hatnet_train.records import Count, Sha256, read_json

MANIFEST = "manifest.json"

VERSION = 1
"""Of the layout of a checkpoint."""

STAGING, REMOVED, DAMAGED = ".staging-", ".removed-", "damaged-"
"""Prefixes of folders that are not, or no longer, checkpoints."""


@dataclass(frozen=True)
class Entry:
    """A file in a manifest."""

    bytes: Count
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json``: files by name, and the accuracy if the checkpoint was evaluated."""

    files: Annotated[dict[str, Entry], Meta(min_length=1)]
    top1: float = -math.inf

    def __post_init__(self) -> None:
        """Refuse names that lead out of the folder."""
        for name in self.files:
            if name in ("", ".", "..", MANIFEST) or re.search(r"[/\\\0]", name):
                raise ValueError(f"files must be names of other files in the folder, got {reprlib.repr(name)}")


class DamagedError(ValueError):
    """Files of a checkpoint are missing or differ from its manifest.

    Attributes:
        problems: one string per file.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


def folder_name(step: int, *, evaluated: bool) -> str:
    """Name of the checkpoint after ``step`` optimizer steps; names sort as the run went."""
    return f"step-{step:010d}" + "-evaluated" * evaluated


def commit(
    checkpoints: Path, name: str, files: Mapping[str, Callable[[Path], None]], about: Mapping[str, Any]
) -> Path:
    """Write a checkpoint as a whole or not at all.

    Args:
        checkpoints: the folder of all checkpoints; made if it is not there, but not the run folder above it.
        name: of the checkpoint, by :func:`folder_name`; a whole one of that name is kept.
        files: what writes each file.
        about: further values for the manifest, anything JSON can hold.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it cannot be written; then nothing of it is left where that is possible.
    """
    final = checkpoints / name
    if final.exists():
        if not any(check(final)):
            return final
        _take_away(final)
    if not checkpoints.is_dir():
        checkpoints.mkdir()
        sync_folder(checkpoints.parent)
    staging = checkpoints / f"{STAGING}{name}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        for file, write in files.items():
            write(staging / file)
        write_manifest(staging, files, about)
        staging.rename(final)
    except OSError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_folder(checkpoints)
    return final


def committed(checkpoints: Path) -> list[Path]:
    """List the checkpoints, the newest first."""
    if not checkpoints.is_dir():
        return []
    found = [p for p in checkpoints.iterdir() if re.fullmatch(r"step-\d{10}(-evaluated)?", p.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint.

    Raises:
        ValueError: if there is none, or not one of this layout, or it names files outside of the folder.
    """
    return read_json(folder / MANIFEST, Manifest, {"version": VERSION})


def check(folder: Path) -> Iterator[str]:
    """Yield a problem for each file of a checkpoint that differs from the manifest."""
    try:
        files = read_manifest(folder).files
    except ValueError as error:
        yield str(error)
        return
    for name, entry in files.items():
        if problem := _problem(folder / name, entry, _digest):
            yield problem


def read(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of a checkpoint; each is read once, and compared with the manifest.

    Raises:
        DamagedError: after the last file, with all problems; nothing is yielded from the first problem on.
    """
    content, problems = b"", []

    def digest(path: Path) -> str:
        nonlocal content
        content = path.read_bytes()
        return hashlib.sha256(content).hexdigest()

    try:
        files = read_manifest(folder).files
    except ValueError as error:
        raise DamagedError([str(error)]) from error
    for name, entry in files.items():
        if problem := _problem(folder / name, entry, digest):
            problems.append(problem)
        elif not problems:
            yield name, content
    if problems:
        raise DamagedError(problems)


def set_aside(checkpoints: Path, good: Path | None) -> None:
    """Rename damaged checkpoints newer than ``good`` to ``damaged-step-…``, so that none is removed in their favour.

    One that cannot be renamed is left.
    """
    for folder in committed(checkpoints):
        if folder == good:
            break
        with contextlib.suppress(OSError):
            folder.rename(folder.with_name(f"{DAMAGED}{folder.name}-{secrets.token_hex(4)}"))


def tidy(checkpoints: Path, keep: int, written: Path) -> None:
    """Remove all checkpoints but the newest ``keep`` and the best, and half-written ones.

    The best is that of the highest ``top1`` in its manifest; of equal ones the newest. A folder that does not go, for
    whatever reason, is left for the next time.

    Args:
        checkpoints: the folder of all checkpoints.
        keep: how many of the newest stay.
        written: the one that was written just now, and stays in any case.
    """
    folders = committed(checkpoints)
    accuracies = {folder: _top1(folder) for folder in folders}
    best = max(folders, key=lambda folder: accuracies[folder], default=None)
    for folder in folders[keep:]:
        if folder not in (best, written):
            with contextlib.suppress(OSError):
                _take_away(folder)
    for left in [p for p in _entries(checkpoints) if p.name.startswith((STAGING, REMOVED))]:
        shutil.rmtree(left, ignore_errors=True)


def write_manifest(folder: Path, names: Iterable[str], about: Mapping[str, Any]) -> None:
    """List existing files of a folder in its manifest.

    Raises:
        OSError: if one cannot be read, or the manifest not be written.
    """
    listed = {name: asdict(_flush(folder / name)) for name in names}
    content = json.dumps({"version": VERSION, **about, "files": listed}, indent=1)
    with atomic_write(folder / MANIFEST) as part:
        part.write_text(content)


def _flush(path: Path) -> Entry:
    """Flush a file to the disk; return its entry of the manifest."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Entry(path.stat().st_size, digest)


def _problem(path: Path, entry: Entry, digest: Callable[[Path], str]) -> str | None:
    try:
        if path.is_symlink() or not path.is_file():
            return f"{path}: the file is missing, expected {entry.bytes} bytes"
        if (size := path.stat().st_size) != entry.bytes:
            return f"{path}: must have {entry.bytes} bytes, got {size}"
        if (found := digest(path)) != entry.sha256:
            return f"{path}: SHA-256 must be {entry.sha256[:16]}..., got {found[:16]}..."
    except OSError as error:
        return f"{path}: cannot read the file: {error.strerror or error}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_away(folder: Path) -> None:
    """Rename what is to be removed: half removed, it must not be taken for a checkpoint."""
    folder.rename(folder.with_name(f"{REMOVED}{folder.name}-{secrets.token_hex(4)}"))


def _top1(folder: Path) -> float:
    try:
        return read_manifest(folder).top1
    except ValueError:
        return -math.inf


def _entries(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(folder.iterdir())
    return []
