"""Peak memory of a piece of work: what PyTorch's allocator holds at most beyond what it held before.

On a GPU the caching allocator keeps the figure itself, scratch space that PyTorch hands to cuDNN and cuBLAS included.
On a CPU the profiler reports every allocation of PyTorch's own and its release; what oneDNN allocates for itself is
not among them, nor is the release of what existed before.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages, about starting and stopping


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Bytes that PyTorch's allocator holds at most while ``work`` runs, beyond those that it holds before.

    What existed before and is released meanwhile makes room on a GPU, and none on a CPU.

    Args:
        work: runs once; its time is of no use, since a profiler watches it on a CPU.
        device: where its tensors are, ``cpu`` or ``cuda``.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak
