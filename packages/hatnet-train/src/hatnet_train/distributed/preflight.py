"""Preflight of a run: compare code and data of all processes, and measure their network.

Runs after :func:`hatnet_train.distributed.launch.join` in every process of a launch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import reprlib
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hatnet_train.distributed.collectives import compare, ranks_by
from hatnet_train.distributed.heartbeat import compact_ranks

ROUNDS = 5
"""Measured all-reduces, and barriers; the median counts, since the first ones after a pause are slow."""

CODE = ("hatnet_core", "hatnet_train")
"""Packages whose code decides what a run computes."""


def preflight(facts: dict[str, str], gradient_bytes: int) -> dict[str, Any]:
    """Compare all processes with rank 0 and measure an all-reduce of the gradients; all ranks call this.

    The bus bandwidth is 2 (n - 1) / n · bytes / seconds for n processes: what a link carries if the all-reduce runs in
    a ring, and so comparable between numbers of processes. One process alone has none.

    Args:
        facts: what must be equal everywhere, by name, such as versions and :func:`code_digest`.
        gradient_bytes: size of the all-reduce in bytes; float32, so 4 bytes a parameter.

    Returns:
        The same on every rank, and ready for JSON: ``world_size``; ``hosts`` and ``devices``, each a dict of names to
        ranks; ``processes``, the process number of each rank; ``facts``; ``all_reduce`` with ``bytes``, ``seconds``
        (the slowest rank's median), ``bus_gigabytes_per_second`` (10⁹ bytes) and ``rounds``; ``barrier_seconds``.

    Raises:
        ValueError: on every rank, so that all can still ``leave``, naming each fact that differs, its ranks and their
            values next to that of rank 0; or if ``gradient_bytes`` is not a positive multiple of 4.
    """
    if gradient_bytes < 4 or gradient_bytes % 4:
        raise ValueError(f"gradient_bytes must be a positive multiple of 4, got {gradient_bytes}")
    device = _device()
    everyone = compare(facts, device=_device_name(device))
    all_reduce, barrier_seconds = _measure(device, gradient_bytes)
    return {
        "world_size": len(everyone),
        "hosts": ranks_by([process["host"] for process in everyone]),
        "devices": ranks_by([process["device"] for process in everyone]),
        "processes": [process["pid"] for process in everyone],
        "facts": everyone[0]["facts"],
        "all_reduce": all_reduce,
        "barrier_seconds": barrier_seconds,
    }


def format_report(report: dict[str, Any]) -> str:
    """Format the report of :func:`preflight` as a table."""
    device_of = {rank: name for name, ranks in report["devices"].items() for rank in ranks}
    rows = [("processes", f"{report['world_size']} on {len(report['hosts'])} host(s)")]
    for host, ranks in report["hosts"].items():
        names = sorted({device_of[rank] for rank in ranks})
        rows.append((f"  {host}", f"{compact_ranks(ranks)}: {', '.join(names)}"))
    rows += report["facts"].items()
    measured = report["all_reduce"]
    rows.append(
        ("all-reduce", "none: one process")
        if report["world_size"] == 1
        else (
            "all-reduce",
            f"{measured['bytes'] / 1e6:.1f} MB in {1e3 * measured['seconds']:.2f} ms, "
            f"bus bandwidth {measured['bus_gigabytes_per_second']:.2f} GB/s",
        )
    )
    rows.append(("barrier", f"{1e3 * report['barrier_seconds']:.2f} ms"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def check_hostfile(path: Path | str) -> dict[str, int]:
    """Read a DeepSpeed hostfile and look every host up.

    Returns:
        As :func:`read_hostfile`.

    Raises:
        ValueError: as :func:`read_hostfile`; also if a host does not resolve, naming it.
    """
    slots = read_hostfile(path)
    for host in slots:
        try:
            socket.getaddrinfo(host, None)
        except (OSError, UnicodeError) as error:  # the latter for what can be no name, such as "a..b"
            reason = error.strerror if isinstance(error, OSError) else "it cannot be a name"
            raise ValueError(f"hostfile {path}: host {host} does not resolve ({reason})") from error
    return slots


def read_hostfile(path: Path | str) -> dict[str, int]:
    """Read a DeepSpeed hostfile.

    A line is ``NAME slots=NUMBER``; empty lines and comments, from ``#`` on, are ignored.

    Returns:
        Number of slots by host, in the order of the file.

    Raises:
        ValueError: naming the file, and the line: a file that cannot be read or names no host, a line of another form,
            a host that comes twice.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ValueError(f"cannot read hostfile {path}: {reason}") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"(\S{1,255})\s+slots=([1-9][0-9]{0,5})", text)
        if match is None:
            if text:
                raise ValueError(f"{path}, line {number}: expected 'NAME slots=NUMBER', got {reprlib.repr(text)}")
            continue
        if match[1] in slots:
            raise ValueError(f"{path}, line {number}: host {match[1]} comes twice; expected one line a host")
        slots[match[1]] = int(match[2])
    if not slots:
        raise ValueError(f"hostfile {path} names no host; expected lines 'NAME slots=NUMBER'")
    return slots


def code_digest() -> str:
    """SHA-256, in hex, over all files of the installed packages of CODE, their names and their bytes."""
    digest = hashlib.sha256()
    for package in CODE:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(f"package {package} is not installed; expected next to hatnet_train")
        root = Path(spec.origin).parent
        files = [p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts and p.name[0] != "."]
        for name, path in sorted((p.relative_to(root).as_posix(), p) for p in files):
            content = path.read_bytes()
            # The length keeps a file's end and the next one's name apart.
            digest.update(f"{package}/{name}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _measure(device: torch.device, size: int) -> tuple[dict[str, Any], float]:
    """Measure an all-reduce of ``size`` bytes, and the seconds of a barrier; the same on every rank."""
    gradients = torch.zeros(size // 4, device=device)
    medians = [_median_seconds(lambda: dist.all_reduce(gradients)), _median_seconds(dist.barrier)]
    slowest = torch.tensor(medians, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    seconds, barrier_seconds = slowest.tolist()
    n = dist.get_world_size()
    bandwidth = 2 * (n - 1) / n * size / seconds / 1e9
    all_reduce = {"bytes": size, "seconds": seconds, "bus_gigabytes_per_second": bandwidth, "rounds": ROUNDS}
    return all_reduce, barrier_seconds


def _median_seconds(communicate: Callable[[], object]) -> float:
    """Median time of ``communicate``, from when all ranks are ready; a first round warms up and does not count."""
    from deepspeed.accelerator import get_accelerator

    seconds = []
    for _ in range(1 + ROUNDS):
        dist.barrier()
        get_accelerator().synchronize()
        start = time.perf_counter()
        communicate()
        get_accelerator().synchronize()  # on an accelerator the call returns before it is done
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _device() -> torch.device:
    """Return the device of this process's tensors."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
