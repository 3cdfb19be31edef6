"""Write files atomically and read JSON, for all packages."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Replace a file in one step: readers see the old content or the new one, never a part.

    Yields a temporary file in the same folder, with the same suffix because libraries choose the format by it. When
    the block ends, the file is flushed to disk and renamed to ``path``. After an error or Ctrl-C it is removed, and
    ``path`` is unchanged. A killed process leaves a hidden ``.NAME.*.tmp*``.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        OSError: on entry if the folder is missing or not writable, at the end if ``path`` is a folder.

    Example:
        >>> with atomic_write("metrics.json") as part:  # doctest: +SKIP
        ...     part.write_text("{}")
    """
    path = Path(path)
    # Not a name of mkstemp, which nobody but the owner could read; not the process id, which containers share.
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        part.touch()  # fail before the work, not after it
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # otherwise a crash of the machine could leave the new name with no content
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Flush the names in a folder to disk, so that a rename survives a crash of the machine."""
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_object(content: Any, origin: str | Path) -> dict[str, Any]:
    """Parse a JSON object, or check one that was parsed as part of another.

    Args:
        content: string or bytes of JSON, or a parsed value.
        origin: where it was read, for the error.

    Raises:
        ValueError: if it is not valid JSON, or not an object.
    """
    if isinstance(content, str | bytes):
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deep
            raise ValueError(f"{origin} must be valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{origin} must be a JSON object, got {type(content).__name__}")
    return content
