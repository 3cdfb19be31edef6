"""Peak memory of a function: the most that PyTorch allocates beyond what was allocated before.

On a GPU the caching allocator records it, including scratch space for cuDNN and cuBLAS. On a CPU the profiler reports
PyTorch's own allocations and releases, but neither oneDNN's nor releases of what existed before.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own messages


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Measure the peak of bytes allocated while ``work`` runs, minus those allocated before.

    A tensor that existed before and is released meanwhile makes room on a GPU, but not on a CPU.

    Args:
        work: runs once, on a CPU under a profiler, so that its time is not representative.
        device: of its tensors, ``cpu`` or ``cuda``.
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
