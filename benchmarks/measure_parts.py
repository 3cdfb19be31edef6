"""Where the time of a forward pass goes: by part of the model beside a roofline, and by kind of operator."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from contenders import Plan, ours, seconds, wait_for
from results import Measurement, Table, interleaved
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hatnet_core import set_kernels

KINDS = {
    "1×1 and other matrix products": ("::mm", "addmm", "addmm_", "linear", "gemm", "cutlass", "nvjet"),
    "convolutions": ("convolution", "conv2d", "cudnn"),
    "attention": ("attention", "bmm", "softmax", "_window", "flash", "fmha"),
    "activations": ("silu", "gelu"),
    "normalisation": ("norm",),
    "depthwise with activations": ("depthwise",),
    "copies and sums": ("copy_", "::cat", "::add", "::clone", "elementwise"),
}
"""Kinds of operators and kernels by parts of their names; the first that fits counts."""


def measure_parts(plan: Plan, *, batches: tuple[int, ...] = (8, 1), size: int = 224) -> Measurement:
    """Milliseconds of each part and its distance from a roofline, and of each kind of operator."""
    what = """HAT-Net-Small, eager. Milliseconds of a batch in each part of the model, and the least that this machine
    would need for it: all multiply-adds as one large matrix product, or reading every block's map and weights and
    writing its map once, whichever takes longer, at the rates measured here in the same run. Then milliseconds by kind
    of operator, as a profiler sees them."""
    dtype = torch.bfloat16 if plan.device.type == "cuda" else torch.float32
    product, copy = _product_rate(plan.device, dtype), _copy_rate(plan.device)
    settings = plan.settings() | {
        "dtype": str(dtype).removeprefix("torch."),
        "rate of a matrix product of 4096×4096": f"{product / 1e9:.0f} GFLOP/s",
        "rate of reading and writing": f"{copy / 1e9:.1f} GB/s",
    }
    result = Measurement("Where the time goes", " ".join(what.split()), settings)
    model = ours().to(plan.device, dtype).model
    set_kernels("auto")
    for batch in batches:
        images = torch.randn(batch, 3, size, size, device=plan.device, dtype=dtype)
        parts = _inputs(model, images)
        turns = {name: _timed(part, x) for name, (part, x) in parts.items()}
        times = interleaved(turns, plan.rounds, f"parts, batch {batch}", warm_up=True)
        limits = {f"{name}, least": [1e3 * _least(part, x, product, copy)] for name, (part, x) in parts.items()}
        table = {key: values for name in parts for key, values in _pair(name, times, limits)}
        result.tables.append(Table(f"batch {batch}", "ms", table))
        kinds = _kinds(model, images)
        result.tables.append(Table(f"by kind of operator, batch {batch}", "ms", kinds))
    return result


def _pair(name: str, times: dict[str, list[float]], limits: dict[str, list[float]]) -> list[tuple[str, list[float]]]:
    return [(name, times[name]), (f"{name}, least", limits[f"{name}, least"])]


def _inputs(model: nn.Module, images: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The parts of the model in order, each with its input, and the whole."""
    parts: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    with torch.no_grad():
        x = images
        modules = {"stem": model.stem} | {f"stage {i + 2}": stage for i, stage in enumerate(model.stages)}
        for name, module in (modules | {"head": model.forward_head}).items():
            parts[name] = (module, x)
            x = module(x)
    return parts | {"the whole": (model, images)}


def _timed(part: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[int], float]:
    return lambda _: 1e3 * min(seconds(part, x) for _ in range(3))


def _least(part: Callable[[Tensor], Tensor], x: Tensor, product: float, copy: float) -> float:
    """Seconds in which a part could be done at the rates of this machine."""
    blocks = [m for m in part.modules() if type(m).__name__ == "Block"] if isinstance(part, nn.Module) else []
    moved: list[int] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        weights = sum(p.numel() for p in module.parameters())
        moved.append((inputs[0].numel() + output.numel() + weights) * output.element_size())

    hooks = [block.register_forward_hook(look) for block in blocks]
    set_kernels("reference")  # whose operators the counter knows
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = part(x)
    set_kernels("auto")
    for hook in hooks:
        hook.remove()
    bytes_moved = sum(moved) or (x.numel() + out.numel()) * out.element_size()
    return max(counter.get_total_flops() / product, bytes_moved / copy)


def _kinds(model: nn.Module, images: Tensor, passes: int = 3) -> dict[str, list[float]]:
    """Milliseconds of a forward pass by kind of operator, most first."""
    gpu = images.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
    seconds(model, images)
    with profile(activities=activities) as profiler:
        for _ in range(passes):
            seconds(model, images)
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), "all else")
        spent[kind] += microseconds / 1e3 / passes
    return {kind: [spent[kind]] for kind, _ in spent.most_common() if spent[kind] > 0}


def _product_rate(device: torch.device, dtype: torch.dtype, side: int = 4096) -> float:
    """FLOP/s of a matrix product, two for a multiply-add as FlopCounterMode counts."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: a @ b, device)


def _copy_rate(device: torch.device, count: int = 2**26) -> float:
    """Bytes read and written in a second, from memory to memory."""
    source, target = torch.zeros(count, device=device), torch.zeros(count, device=device)
    return 8 * count / _fastest(lambda: target.copy_(source), device)


def _fastest(work: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times)
