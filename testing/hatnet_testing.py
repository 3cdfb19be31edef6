"""Checks of errors that leave their wording free: the type or the exit status, and what the message has to name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

LINES = 10
"""Longest message of an error."""

BOX_LINES = 25
"""Longest box of tyro, which repeats the help of an option."""


@contextmanager
def raises(kind: type[BaseException] | tuple[type[BaseException], ...], *named: object) -> Iterator[Any]:
    """Expect an error whose message names everything in ``named``, such as a field, its value and a remedy."""
    with pytest.raises(kind) as caught:
        yield caught
    check(str(caught.value), *named)
    del caught  # the traceback refers to this frame: a cycle would keep what the error holds, such as a socket


@contextmanager
def warns(kind: type[Warning], *named: object) -> Iterator[Any]:
    """Expect one warning that names everything in ``named``."""
    with pytest.warns(kind) as caught:
        yield caught
    (warning,) = [one for one in caught if issubclass(one.category, kind)]
    check(str(warning.message), *named)


def error_line(stderr: str, command: str, *named: object) -> str:
    """Return the one line ``<command>: error: ...`` of a command's output, which names everything in ``named``."""
    lines = [line for line in stderr.splitlines() if ": error: " in line]
    assert len(lines) == 1, stderr
    assert lines[0].startswith(f"{command}: error: "), lines[0]
    check(lines[0], *named)
    return lines[0]


def usage_error(stderr: str, *named: object) -> None:
    """Check what a command prints about its own arguments: a line or a short box, which may wrap its text."""
    check(" ".join(re.sub("[│╭╮╰╯─]", " ", stderr).split()), *named)
    assert len(stderr.splitlines()) <= BOX_LINES, stderr


def check(message: str, *named: object) -> None:
    """Check that a message is short and names everything in ``named``, as whole words."""
    assert message.strip()
    assert len(message.splitlines()) <= LINES, message
    missing = [str(name) for name in named if not _mentions(message, str(name))]
    assert not missing, f"{missing} not in {message!r}"


def _mentions(message: str, name: str) -> bool:
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w$", name) else ""
    return re.search(before + re.escape(name) + after, message) is not None
