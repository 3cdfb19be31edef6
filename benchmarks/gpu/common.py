"""Output, timers, CUDA graphs and processes that take turns, for the GPU measurements."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DRY = os.environ.get("HATNET_GPU_DRY") == "1"
if DRY:  # before anything imports Triton
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

OUT = Path(os.environ.get("OUT", "gpu-out"))
DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
START = time.monotonic()


def say(*words: Any) -> None:
    """Print a line at once, with the seconds since the start of the script."""
    print(f"[{time.monotonic() - START:4.0f} s]", *words, flush=True)


def record(name: str, row: Mapping[str, Any]) -> None:
    """Append a row to $OUT/NAME.jsonl, so that a run that is cut off loses nothing."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], seconds: float = 0.45) -> float:
    """Median over three blocks of calls, ``seconds`` in all, after a warm-up; host time counts."""
    for _ in range(1 if DRY else 3):
        work()
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    count = 1 if DRY else max(3, round(seconds / 3 / max(time.perf_counter() - start, 1e-5)))
    blocks = []
    for _ in range(1 if DRY else 3):
        start = time.perf_counter()
        for _ in range(count):
            work()
        synchronize()
        blocks.append(1e3 * (time.perf_counter() - start) / count)
    return statistics.median(blocks)


def kernel_milliseconds(work: Callable[[], Any]) -> float:
    """Median time on the GPU alone: repeated calls in a CUDA graph, so that launches of slow hosts do not count."""
    if DRY:
        return milliseconds(work)
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(work, rep=15, return_mode="median"))


def graphed(work: Callable[[], Any]) -> Callable[[], Any]:
    """Capture ``work`` as one CUDA graph, after a warm-up on a side stream, and return its replay."""
    if DRY:
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def channels_last(*size: int, dtype: torch.dtype) -> Tensor:
    """Random normal values; maps are in channels_last."""
    x = torch.randn(size, device=DEVICE, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def build(name: str, kernels: str) -> nn.Module:
    """Return a model in channels_last: a HAT-Net with ``kernels`` (triton or plain), or one of timm."""
    torch.manual_seed(0)
    with DEVICE:
        if not name.startswith("hatnet"):
            import timm

            model = timm.create_model(name)
        else:
            from hatnet_core import create_model, set_kernels

            # the interpreter would take minutes for a model
            set_kernels("plain" if kernels == "plain" else "auto" if DRY else "triton")
            model = create_model(name)
    return model.to(memory_format=torch.channels_last)


def in_turn(
    prepare: Callable[[Any], Callable[[], Any]], jobs: Sequence[Any], prepare_s: float, work_s: float
) -> Iterator[tuple[Any, Any]]:
    """Prepare all jobs at once, each in a process; then let those that are ready work one after the other.

    Args:
        prepare: takes a job and returns its work, which returns a picklable result.
        jobs: picklable.
        prepare_s: seconds after which jobs that are not ready are ended.
        work_s: seconds for the work of one job.

    Yields:
        Pairs of a job and its result, None where it failed or ran out of time.
    """
    slack = 20 if DRY else 1
    context = multiprocessing.get_context("spawn")
    children = []
    for job in jobs:
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, prepare, job))
        process.start()
        children.append((job, process, ours))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        deadline = time.monotonic() + slack * prepare_s
        ready = [_receive(ours, process, deadline) is True for _, process, ours in children]
        say(f"{sum(ready)} of {len(jobs)} jobs are ready")
        for (_, process, _), is_ready in zip(children, ready, strict=True):
            if not is_ready:  # what still compiles would disturb the others
                _end(process)
        for (job, process, ours), is_ready in zip(children, ready, strict=True):
            if is_ready:
                ours.send(True)
            yield job, _receive(ours, process, time.monotonic() + slack * work_s) if is_ready else None
            _end(process)
    finally:
        for _, process, _ in children:
            _end(process)


def _child(pipe: Connection, prepare: Callable[[Any], Callable[[], Any]], job: Any) -> None:
    os.setsid()  # so that compilers it starts can be ended with it
    work = prepare(job)
    synchronize()
    pipe.send(True)
    pipe.recv()
    pipe.send(work())


def _receive(pipe: Connection, process: Any, deadline: float) -> Any:
    while time.monotonic() < deadline:
        if pipe.poll(0.05):
            try:
                return pipe.recv()
            except EOFError:
                return None
        if not process.is_alive() and not pipe.poll():
            return None
    return None


def _end(process: Any) -> None:
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not called setsid yet
            process.kill()
    process.join()
