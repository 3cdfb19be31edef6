"""Messages of errors in one line."""

from __future__ import annotations

LONGEST = 300
"""Longest message of another library, in characters; some contain a whole config."""

EXPECTED = (ImportError, ValueError, OSError)
"""Errors whose message is for users; of other errors, the type is shown, too."""


def said(error: BaseException) -> str:
    """Return the message of an error in one line, after its type unless it is one of :data:`EXPECTED`."""
    text = str(error)
    if "\nOriginal Traceback" in text:  # from a data worker; the last line is the error
        return text.rstrip().rpartition("\n")[2].removeprefix("ValueError: ")
    if isinstance(error, EXPECTED):
        return " ".join(text.split()) or type(error).__name__
    first = text.strip().partition("\n")[0]
    return cut(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def cut(text: str) -> str:
    """Shorten a message of another library to one line of at most :data:`LONGEST` characters."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
