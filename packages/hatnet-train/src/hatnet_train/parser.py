"""A parser for commands that a launcher may start many times at once: what all processes meet is told once."""

from __future__ import annotations

import os
import re
import time
import traceback

from hatnet_core.commands import EXPECTED, TRACEBACK, Parser
from hatnet_train.signals import stop_noticing

GRACE_SECONDS = 10.0
"""How long another process than the first waits before it tells an error, which is mostly the first's, too."""

LOST_CONTACT = (
    r"Connection (closed by peer|reset)|Connection refused|NCCL|ProcessGroup|Timed out waiting|gloo|Broken pipe"
)
"""What the errors of torch's communication say."""

CAUSES = {
    LOST_CONTACT: ("lost contact with another process, whose own output says why"),
    r"DataLoader worker \(pid.*\) (is killed|exited unexpectedly)": (
        "a data worker was killed from outside, perhaps for its memory; fewer --workers need less"
    ),
    r"out of memory|can't allocate memory": (
        "not enough memory; a smaller batch needs less, and in training --accumulation or --activation-checkpointing"
    ),
}
"""What errors of torch mean that are no fault of the program, by regular expression."""


class LaunchedParser(Parser):
    """A parser for a command that a launcher may start many times at once."""

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
        if isinstance(error, RuntimeError) and (known := _known_cause(str(error))):
            return known
        if not isinstance(error, EXPECTED) and not os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        return super().explain(error)


def _known_cause(text: str) -> str | None:
    for pattern, meaning in CAUSES.items():
        if re.search(pattern, text):
            return f"{meaning} ({text.strip().partition(chr(10))[0]})"
    return None
