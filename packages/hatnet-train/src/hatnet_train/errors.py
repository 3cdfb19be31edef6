"""Errors of the machine and of other processes in one line, with what fixes them in the options of the command."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Collection

from hatnet_core.console import EXPECTED, TRACEBACK, Command, error_text, flags_of, rank
from hatnet_train.distributed.errors import LOST_CONTACT
from hatnet_train.signals import stop_noticing
from hatnet_train.workers import OF_THE_MACHINE, WorkerError

GRACE_SECONDS = 10.0
"""Time that another rank than the first waits before it reports an error, which is mostly that of the first, too."""

LESS = {
    "--batch-size": "a smaller --batch-size",
    "--batch": "a smaller --batch",
    "--workers": "fewer --workers",
    "--accumulation": "more --accumulation",
    "--activation-checkpointing": "--activation-checkpointing",
}
"""Options that reduce what a command takes of the machine, where it has them."""


def _no_room(text: str) -> tuple[str, ...]:
    size = ""
    with contextlib.suppress(OSError):
        size = f" ({shutil.disk_usage('/dev/shm').total / 2**20:.3g} MiB)"  # noqa: S108  where Linux shares memory
    return f"no room in /dev/shm{size}", "docker run --shm-size=8g", "--workers"


def _too_many_files(text: str) -> tuple[str, ...]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"too many open files (limit {soft})", f"ulimit -n {hard if hard > soft else 4 * soft}", "--workers"


CAUSES: dict[str, Callable[[str], tuple[str, ...]]] = {
    r"Too many open files|ancdata|receive a batch: EOFError": _too_many_files,
    r"shared memory|[Bb]us error|data workers: .*No space left": _no_room,
    r"Resource temporarily unavailable|can't start new thread": lambda text: (
        "no more processes or threads can be started (ulimit -u)",
        "--workers",
    ),
    r"worker.* (is|was) killed|worker.*exited unexpectedly|cannot receive a batch": lambda text: (
        "a worker was killed (out of memory?)",
        "--workers",
    ),
    LOST_CONTACT: lambda text: (f"lost contact with another process, see its own output ({text})",),
    r"out of memory|can't allocate memory|Cannot allocate memory|MemoryError": lambda text: (
        f"not enough memory ({text})",
        *LESS,
    ),
}
"""Errors of the machine by regular expression: the cause, then remedies or options of :data:`LESS`."""


def explain(error: Exception, options: Command) -> str:
    """Return an error in one line; the traceback of an unexpected one goes to standard error, as runs are long.

    The launcher ends all processes soon after the first: the others leave rank 0 time to report, and report only
    if it did not end, because the error was theirs alone.
    """
    text = _explain(error, options)
    if rank() == 0:
        return text
    stop_noticing()  # the launcher's SIGTERM is meant
    time.sleep(GRACE_SECONDS)
    return f"[rank {rank()}] {text}"


def _explain(error: Exception, options: Command) -> str:
    if isinstance(error, RuntimeError | MemoryError | OSError) and (
        known := _cause(error, flags_of(options).values())
    ):
        return known
    if isinstance(error, WorkerError):
        sys.stderr.write(error.trace)
        return f"a data worker failed: {error}"
    if not isinstance(error, EXPECTED) and not os.environ.get(TRACEBACK) and not options.verbose:
        traceback.print_exception(error)
        return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return error_text(error, options)


def _cause(error: Exception, flags: Collection[str]) -> str | None:
    if isinstance(error, OSError) and not (isinstance(error, ChildProcessError) or error.errno in OF_THE_MACHINE):
        return None
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    for pattern, meaning in CAUSES.items():
        if re.search(pattern, f"{type(error).__name__}: {error}"):
            cause, *ways = meaning(text)
            ways = [LESS.get(way, way) for way in ways if way not in LESS or way in flags]
            *most, last = ways or [""]
            return f"{cause}: {', '.join(most)}{', or ' if most else ''}{last}".removesuffix(": ")
    return None
