"""Heartbeat of every process, to name the one that is gone or hangs when others wait for it.

A thread of every process writes a sign of life to the store of the launch every few seconds, with the number of steps
the process has made. A process whose communication fails, or that makes no step for a long time, reads them all: who
gives no sign any more is gone, and of those that all do, who has made the fewest steps holds the others up.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence

import torch
from torch._C._distributed_c10d import Store  # torch.distributed has them, but exports no types

SILENT_SECONDS = 10.0
"""Seconds without a sign of life after which a process counts as gone: killed, host down, or network down."""

PATIENCE_SECONDS = 6 * SILENT_SECONDS
"""After so long without a sign of the next rank, a process looks for itself, and ends; its own communication should
have failed before that."""

ADVICE = "its own output may say why; --resume auto resumes from the newest checkpoint"

_EVERY = 2.0  # seconds between two signs

_REASON = "life/reason"


class Watch:
    """Heartbeat of this process, and a view of those of the others.

    Args:
        store: of the launch; a connection that nobody else uses.
        rank: this process.
        world_size: number of processes.
        master: rank 0 and its address, for messages.
        timeout: seconds without a step after which a process looks what holds it up, and ends.
    """

    def __init__(self, store: Store, rank: int, world_size: int, master: str, timeout: float) -> None:
        self._store, self._rank, self._world_size, self._master = store, rank, world_size, master
        self._timeout = timeout
        self._signs = self._marks = 0
        self._marked: float | None = None
        self._looking = False
        self._ended = threading.Event()
        self._me = f"{socket.gethostname()} (process {os.getpid()})"
        self._thread = threading.Thread(target=self._live, daemon=True)
        if world_size > 1:
            self._sign()
            self._thread.start()

    def mark(self) -> None:
        """Mark progress: this process is about to wait for the others, and they do not wait for it."""
        self._marks += 1
        self._marked = time.monotonic()

    def end(self) -> None:
        """Stop the heartbeat."""
        self._ended.set()

    def tell(self, reason: str) -> None:
        """Tell the others why this process ends alone."""
        with contextlib.suppress(torch.distributed.DistError):
            self._store.set(_REASON, f"rank {self._rank} on {self._me} has ended: {reason}")

    def culprits(self) -> str:
        """Name the processes that are gone or slow; takes :data:`SILENT_SECONDS` or a little longer."""
        self._looking = True  # who looks need not be looked after
        try:
            return self._culprits()
        except torch.distributed.DistError:
            return f"{self._master} is gone: nothing answers there any more"

    def _culprits(self) -> str:
        if self._store.check([_REASON]):
            return self._store.get(_REASON).decode()
        ranks = range(self._world_size)
        first, start = self._read(ranks), time.monotonic()
        silent, now = list(ranks), first
        while silent and time.monotonic() - start < SILENT_SECONDS:
            time.sleep(_EVERY / 2)
            now = self._read(ranks)
            silent = [rank for rank in silent if now[rank][0] == first[rank][0]]
            if self._store.check([_REASON]):
                return self._store.get(_REASON).decode()
        if silent:
            hosts = "; ".join(f"rank {rank} on {now[rank][2]}" for rank in silent)
            return f"no sign of life from {compact_ranks(silent)} for {SILENT_SECONDS:g} s ({hosts})"
        fewest = min(marks for _, marks, _ in now)
        slow = [rank for rank in ranks if now[rank][1] == fewest]
        hosts = "; ".join(f"rank {rank} on {now[rank][2]}" for rank in slow)
        return f"all processes live; {compact_ranks(slow)} got least far ({hosts})"

    def _read(self, ranks: Sequence[int]) -> list[tuple[int, int, str]]:
        """Read signs, marks and place of every rank."""
        keys = [f"life/{rank}" for rank in ranks]
        return [tuple(json.loads(value)) for value in self._store.multi_get(keys)]

    def _live(self) -> None:
        """Sign, watch the next rank, and watch the progress of this process."""
        neighbour = (self._rank + 1) % self._world_size
        signs, heard = b"", time.monotonic()
        while not self._ended.wait(_EVERY):
            now = time.monotonic()
            with contextlib.suppress(torch.distributed.DistError):  # rank 0 is gone, or ends as this one is about to
                self._sign()
                if self._store.check([f"life/{neighbour}"]):
                    before, signs = signs, self._store.get(f"life/{neighbour}")
                    heard = heard if signs == before else now
            if self._looking:
                continue
            if now - heard > PATIENCE_SECONDS:
                self._end_process(f"{compact_ranks([neighbour])} or rank 0 gave no sign for {PATIENCE_SECONDS:g} s")
            elif self._marked is not None and now - self._marked > self._timeout + 5 * _EVERY:
                self._end_process(f"no step for {self._timeout:g} s")

    def _sign(self) -> None:
        self._signs += 1
        self._store.set(f"life/{self._rank}", json.dumps([self._signs, self._marks, self._me]))

    def _end_process(self, why: str) -> None:
        """End in a thread, so that the heartbeat continues: NCCL may hang where it should fail."""
        self._looking = True
        threading.Thread(target=self._look_and_end, args=(why,), daemon=True).start()

    def _look_and_end(self, why: str) -> None:
        message = f"{why}; {self.culprits()}; {ADVICE}"
        os.write(sys.stderr.fileno(), f"hatnet-train: error: [rank {self._rank}] {message}\n".encode())
        time.sleep(SILENT_SECONDS)  # the others look at the same time, and should not find this one gone
        os._exit(1)


def compact_ranks(ranks: Iterable[int]) -> str:
    """Format ranks in short: "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"
