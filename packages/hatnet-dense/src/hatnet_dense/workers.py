"""End a run at once if its data workers fail, with the cause and the fix in one line.

A worker passes a batch on in a thread of its queue. An error there, such as full shared memory, is printed and
dropped, and the run waits for the batch forever. Here the worker reports the error and exits, which the run notices.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue, SimpleQueue
from pathlib import Path
from types import TracebackType
from typing import Any

from hatnet_dense.errors import cut, said

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  # torch's, for batches

FULL = ("No space left on device", "Bus error", "shared memory", "unable to write to file", "unable to mmap")
FILES = ("Too many open files", "ancdata")
MEMORY = ("MemoryError", "Cannot allocate memory", "not enough memory")
DIED = ("signal: Killed", "exited unexpectedly")
"""Parts of messages of torch and Python about an exhausted resource."""


class Workers:
    """Context of the data workers of one run, which ends them all on exit.

    Args:
        *loaders: keys of the data loaders in the config, such as ``train_dataloader``, for messages.

    Raises:
        ValueError: on exit, if workers failed because memory, shared memory or file descriptors ran out.
    """

    def __init__(self, *loaders: str) -> None:
        self._loaders = loaders
        self._reports: SimpleQueue[str] = multiprocessing.SimpleQueue()
        self._others = set(multiprocessing.active_children())

    def reporting(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a runner's ``build_dataloader``, so that workers report batches that they cannot pass on."""

        def built(*arguments: Any, **options: Any) -> Any:
            loader = build(*arguments, **options)
            loader.worker_init_fn = partial(_start, self._reports, loader.worker_init_fn)
            return loader

        return built

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _kill(set(multiprocessing.active_children()) - self._others)
        if not isinstance(error, Exception):
            return
        reported = "" if self._reports.empty() else self._reports.get()
        if not reported and not any(part in str(error) for part in ("DataLoader worker", *FILES)):
            return
        cause = cut(reported or said(error))
        remedy = self._remedy(f"{reported} {error}")
        if reported or remedy:
            raise ValueError(f"{remedy} ({cause})" if remedy else f"a data worker failed: {cause}") from error

    def _remedy(self, text: str) -> str:
        fewer = f"fewer {' or '.join(f'{loader}.num_workers' for loader in self._loaders)}"
        if any(part in text for part in FILES):
            return f"too many open files: ulimit -n 65536, or {fewer}"
        if any(part in text for part in FULL) and SHARED_MEMORY.is_dir():
            size = shutil.disk_usage(SHARED_MEMORY).total / 2**20
            return f"no room in {SHARED_MEMORY} ({size:,.2f} MiB): docker run --shm-size=8g, or {fewer}"
        if any(part in text for part in MEMORY):
            return f"out of memory: {fewer}, or a smaller {self._loaders[0]}.batch_size"
        if any(part in text for part in DIED):
            return f"a data worker was killed (out of memory?): {fewer}"
        return ""


def _start(reports: SimpleQueue[str], init: Callable[[int], None] | None, worker: int) -> None:
    """Initialise a worker: report errors of its queue, and call MMEngine's ``worker_init_fn``."""

    def report(error: Exception, _: Any) -> None:
        reports.put(f"{type(error).__name__}: {error}")
        os._exit(1)

    # The class has no public hook for errors of its thread; test_workers.py fails if this private one changes.
    Queue._on_queue_feeder_error = staticmethod(report)  # type: ignore[attr-defined]
    if init is not None:
        init(worker)


def _kill(children: Iterable[BaseProcess]) -> None:
    """Kill workers, because one that hangs ignores SIGTERM."""
    in_main = threading.current_thread() is threading.main_thread()
    # torch's handler would report the end of a worker as an error
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    for child in children:
        child.kill()
    for child in children:
        child.join()
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
