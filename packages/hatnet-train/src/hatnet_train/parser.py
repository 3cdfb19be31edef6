"""A parser for commands that a launcher may start many times at once: what all processes meet is told once."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence

from hatnet_core.commands import EXPECTED, TRACEBACK, Parser
from hatnet_train.signals import stop_noticing
from hatnet_train.workers import OF_THE_MACHINE, WorkerError, kill

GRACE_SECONDS = 10.0
"""How long another process than the first waits before it tells an error, which is mostly the first's, too."""

LOST_CONTACT = (
    r"Connection (closed by peer|reset)|Connection refused|NCCL|ProcessGroup|Timed out waiting|gloo|Broken pipe"
)
"""What the errors of torch's communication say."""

LESS = {
    "--batch-size": "a smaller --batch-size",
    "--batch": "a smaller --batch",
    "--workers": "fewer --workers",
    "--accumulation": "more --accumulation",
    "--activation-checkpointing": "--activation-checkpointing",
}
"""Options that let a command take less of the machine, where it has them."""


def _no_room(text: str) -> tuple[str, ...]:
    size = ""
    with contextlib.suppress(OSError):
        size = f" ({shutil.disk_usage('/dev/shm').total / 2**20:.3g} MB)"  # noqa: S108  where Linux shares memory
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
    LOST_CONTACT: lambda text: (f"lost contact with another process, whose own output says why ({text})",),
    r"out of memory|can't allocate memory|Cannot allocate memory|MemoryError": lambda text: (
        f"not enough memory ({text})",
        *LESS,
    ),
}
"""Errors of the machine by regular expression: the cause, then remedies or options of :data:`LESS`."""


class LaunchedParser(Parser):
    """A parser for a command that a launcher may start many times at once."""

    def run(self, work: Callable[[argparse.Namespace], int | None], arguments: Sequence[str] | None = None) -> int:
        """Parse and work as every command does, and leave no worker behind, however the work ended."""
        try:
            return super().run(work, arguments)
        finally:
            kill()

    def tell(self, message: str, *, kind: str = "error: ") -> None:
        """Report what usually every process of a launch meets, once.

        The launcher ends all processes soon after the first: the others leave rank 0 time to report, and speak only
        where it did not end, because the error was theirs alone.
        """
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            stop_noticing()  # the launcher's SIGTERM is meant
            time.sleep(GRACE_SECONDS)
            message = f"[rank {rank}] {message}"
        super().tell(message, kind=kind)

    def explain(self, error: Exception) -> str:
        """An error in one line; of one that is a mistake of ours, since a run cannot be repeated for it, the trace."""
        if isinstance(error, RuntimeError | MemoryError | OSError) and (known := self._known_cause(error)):
            return known
        if isinstance(error, WorkerError):
            sys.stderr.write(error.trace)
            return f"a data worker failed: {error}"
        if not isinstance(error, EXPECTED) and not os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        return self._spelled(super().explain(error))

    def _known_cause(self, error: Exception) -> str | None:
        if isinstance(error, OSError) and not (isinstance(error, ChildProcessError) or error.errno in OF_THE_MACHINE):
            return None
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        for pattern, meaning in CAUSES.items():
            if re.search(pattern, f"{type(error).__name__}: {error}"):
                cause, *ways = meaning(text)
                ways = [LESS.get(way, way) for way in ways if way not in LESS or way in self._option_string_actions]
                *most, last = ways or [""]
                return f"{cause}: {', '.join(most)}{', or ' if most else ''}{last}".removesuffix(": ")
        return None

    def _spelled(self, text: str) -> str:
        """Spell the names of values as the options of this command: ``--batch-size`` for ``batch_size``."""
        for action in self._actions:
            name, flag = action.dest, next((option for option in action.option_strings if option[:2] == "--"), None)
            if flag is None or "_" in flag:
                continue
            where = r"(?<![\w./-])" if "_" in name else "^"
            after = r"(?![\w/-])(?!\.\w)" if "_" in name else r"(?= must be )"
            text = re.sub(f"{where}{name}{after}", flag, text)
        return text
