"""Launches of one or more processes, that can be hit by signals while they run."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BIN = Path(sys.executable).parent


class Warm:
    """The process that the others are forked from; see ``warm.py``.

    Args:
        prefix: of its command.
    """

    def __init__(self, *prefix):
        path = os.pathsep.join([str(HERE), str(HERE / "faults"), *sys.path])
        self.process = subprocess.Popen(
            [*prefix, sys.executable, HERE / "warm.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    @property
    def root(self):
        """Path at which its file systems are visible from outside."""
        return Path(f"/proc/{self.process.pid}/root")

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


class Launch:
    """The processes of a launch; leaving it as a context ends those that still run, with what they started."""

    def __init__(self, warm, logs, ranks, arguments, module="hatnet_train.cli", function="train", environ=None):
        self.warm, self.exits = warm, {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        common = {"LOCAL_WORLD_SIZE": ranks, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common |= environ or {}
        self.logs = [logs / f"{port}-{rank}.log" for rank in range(ranks)]
        self.pids = [
            warm.ask(
                module=module,
                function=function,
                arguments=[str(part) for part in arguments],
                environ={name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()},
                output=str(self.logs[rank]),
                folder=str(logs),
            )
            for rank in range(ranks)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for rank in range(len(self.pids)):
            if self.poll(rank) is None:
                self.send(rank, signal.SIGKILL, to_all=True)
        self.wait()

    def poll(self, rank):
        """Exit status of a rank, None while it runs."""
        if rank not in self.exits and (status := self.warm.ask(poll=self.pids[rank])) is not None:
            self.exits[rank] = status
        return self.exits.get(rank)

    def wait(self, seconds=300):
        """Exit statuses of all ranks."""
        until(lambda: all(self.poll(rank) is not None for rank in range(len(self.pids))), seconds, self.text)
        return [self.exits[rank] for rank in range(len(self.pids))]

    def send(self, rank, number, *, to_all=False):
        """Send a signal to a rank, or also to its data workers; it may have ended before."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if to_all else os.kill)(self.pids[rank], number)

    def log(self, rank):
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def text(self):
        return "\n".join(f"rank {rank}:\n{self.log(rank)}" for rank in range(len(self.pids)))


def lines_naming(text, *named):
    """Lines of a log that contain everything in ``named``."""
    return [line for line in text.splitlines() if all(str(name) in line for name in named)]


def until(holds, seconds, what=str):
    """Wait until something holds, at most so long."""
    start = time.monotonic()
    while not holds():
        assert time.monotonic() - start < seconds, what()
        time.sleep(0.02)
