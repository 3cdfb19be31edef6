"""Worker processes that end with their command, whatever they are doing.

They ignore SIGTERM, which often reaches all processes of a job, and Python waits for its workers when it exits. So
they are killed, never asked.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import signal
import threading
from collections.abc import Collection, Iterator
from multiprocessing.process import BaseProcess

OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}
"""System errors that say nothing of the file or the host at which they happen."""


class WorkerError(RuntimeError):
    """A worker failed or could not be started, and no image is to blame.

    Args:
        reason: the error, with its type.
        trace: its traceback in the worker, if it has one.
    """

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason)
        self.trace = trace


def kill(workers: Collection[BaseProcess] | None = None) -> None:
    """Kill workers and reap them; by default all of this process."""
    with _deaths_expected():
        workers = multiprocessing.active_children() if workers is None else workers
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()


@contextlib.contextmanager
def _deaths_expected() -> Iterator[None]:
    """Keep torch from raising in the handler of SIGCHLD, where it reports workers that were killed from outside."""
    if threading.current_thread() is not threading.main_thread():  # which alone handles signals
        yield
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
