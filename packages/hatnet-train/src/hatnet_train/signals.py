"""Signals that ask a run to stop: SIGTERM, and SIGUSR1, which SLURM sends ahead of a time limit."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGUSR1)

REQUEUE = 75
"""Exit status of a run that stopped as requested and can resume; EX_TEMPFAIL of sysexits.h."""


class Preempted(Exception):  # noqa: N818  an end, not an error
    """The run stops as requested, and can resume.

    Attributes:
        step: the step after which it was saved.
    """

    def __init__(self, step: int) -> None:
        super().__init__(f"saved at step {step} and stopped as requested; --resume auto resumes from there")
        self.step = step


class Signals:
    """Watch for SIGTERM and SIGUSR1, and end the process if the run does not stop in time.

    The run looks at ``received`` between steps. The time is kept by a thread that the system wakes, since Python's own
    handlers wait while a process waits for others in torch.

    Args:
        budget: seconds from the signal until the process is ended, with status :data:`REQUEUE`.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.received = False
        self._woken, self._waking = socket.socketpair()
        self._waking.setblocking(False)
        signal.set_wakeup_fd(self._waking.fileno(), warn_on_full_buffer=False)
        for number in ENDING:
            signal.signal(number, self._note)
        threading.Thread(target=self._keep_time, daemon=True).start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def _keep_time(self) -> None:
        while self._woken.recv(1)[0] not in ENDING:
            continue
        self.received = True
        time.sleep(self.budget)
        message = f"hatnet-train: error: did not stop within the {self.budget:g} s of --preempt-seconds; "
        os.write(sys.stderr.fileno(), f"{message}--resume auto resumes from the newest checkpoint\n".encode())
        os._exit(REQUEUE)


def stop_noticing() -> None:
    """Let these signals end the process again, the default."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


def ignore_in_worker() -> None:
    """In a data worker: leave these signals, which often go to all processes of a job, to the run itself."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
