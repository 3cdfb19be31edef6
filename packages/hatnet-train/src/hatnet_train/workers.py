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
    workers = multiprocessing.active_children() if workers is None else workers
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


@contextlib.contextmanager
def child_signal_unhandled() -> Iterator[None]:
    """Undo the handler of SIGCHLD that torch installs with the first worker of a process.

    It raises the death of a worker wherever the main thread is, such as in a destructor, which drops it. Without it,
    the loader finds that a worker is dead within 5 seconds.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
