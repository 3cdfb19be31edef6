"""Files that are replaced as a whole, and reach the disk."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Replace a file: readers see the old content or the new one, never a part.

    Raises:
        OSError: if it cannot be written; the old one stays.
    """
    new = staged(path)
    try:
        new.write_bytes(content)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(path.parent)


def staged(path: Path) -> Path:
    """Path at which new content of a file is written first."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
