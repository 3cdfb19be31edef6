"""What an error says in one line, whoever raised it."""

from __future__ import annotations

LONGEST = 300
"""Characters of a message that is not ours; some of the libraries' hold a whole config."""

EXPECTED = (ImportError, ValueError, OSError)
"""Errors that speak to the user; of any other, the type says more than the message."""


def said(error: BaseException) -> str:
    """The message of an error in one line, after its type if it is none of :data:`EXPECTED`."""
    text = str(error)
    if "\nOriginal Traceback" in text:  # of a process that loads data; the last line is the error itself
        return text.rstrip().rpartition("\n")[2].removeprefix("ValueError: ")
    if isinstance(error, EXPECTED):
        return " ".join(text.split()) or type(error).__name__
    first = text.strip().partition("\n")[0]
    return cut(f"{type(error).__name__}: {first}" if first else type(error).__name__)


def cut(text: str) -> str:
    """A message that is not ours, in one line and not longer than :data:`LONGEST`."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"
