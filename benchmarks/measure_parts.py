"""Time of a forward pass: by part of the model with a roofline, and by kind of operator."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contenders import Plan, ours, seconds
from harness import Measurement, Ratio, Table, interleaved, quotients
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from hatnet_core import set_kernels
from hatnet_core.model import Block

KINDS = {
    "matrix products": ("::mm", "addmm", "addmm_", "linear", "gemm", "cutlass", "nvjet"),
    "convolutions, 1×1 and depthwise among them": ("convolution", "conv2d", "cudnn"),
    "attention": ("attention", "bmm", "softmax", "_window", "flash", "fmha"),
    "activations, on a GPU with the depthwise convolution": ("silu", "gelu", "depthwise"),
    "normalisation": ("norm",),
    "copies and sums": ("copy_", "::cat", "::add", "::clone", "elementwise"),
}
"""Kinds of operators and kernels by parts of their names; the first that fits counts."""

PRODUCT, COPY = "FLOPs of a product of 4096×4096", "bytes read and written"


def measure_parts(args: argparse.Namespace) -> Measurement:
    """Milliseconds of each part and its distance from a roofline, and of each kind of operator."""
    plan = Plan(rounds=args.rounds)
    what = """HAT-Net-Small, eager. Milliseconds of a batch in each part of the model, next to the least that this
    machine would need for it: all multiply-adds as one product of 4096×4096 matrices, or reading every block's map
    and weights and writing its map once, whichever takes longer, at the rates measured in the same round. Then
    milliseconds by kind of operator, as a profiler sees them."""
    dtype = torch.bfloat16 if plan.device.type == "cuda" else torch.float32
    result = Measurement("Where the time goes", what, plan.settings() | {"dtype": _name(dtype)})
    model = ours().to(plan.device, dtype).model
    set_kernels("auto")
    for batch in (8, 1):
        images = torch.randn(batch, 3, 224, 224, device=plan.device, dtype=dtype)
        parts = _inputs(model, images)
        needs = {name: _needs(part, x) for name, (part, x) in parts.items()}
        turns = {name: _timed(partial(seconds, part, x)) for name, (part, x) in parts.items()}
        times = interleaved(turns | _ceilings(plan.device, dtype), plan.rounds, f"parts, batch {batch}", warm_up=True)
        product, copy = times.pop(PRODUCT), times.pop(COPY)
        table, ratios = {}, []
        for name, (flops, moved) in needs.items():
            rates = zip(product, copy, strict=True)
            least = [max(flops * of_flop, moved * of_byte) for of_flop, of_byte in rates]
            table |= {name: times[name], f"{name}, least": least}
            ratios.append(Ratio(f"least to measured, {name}, batch {batch}", quotients(least, times[name])))
        result.tables.append(Table(f"batch {batch}", "ms", table))
        rates = {PRODUCT: [1e-6 / ms for ms in product], COPY: [1e-6 / ms for ms in copy]}
        result.tables.append(Table(f"rates meanwhile, batch {batch}", "10⁹/s", rates))
        result.tables.append(Table(f"by kind of operator, batch {batch}", "ms", _kinds(model, images)))
        result.ratios += ratios
    return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _inputs(model: nn.Module, images: Tensor) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Return the parts of the model in order, each with its input, and the whole."""
    parts: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {}
    with torch.no_grad():
        x = images
        modules = {"stem": model.stem} | {f"stage {i + 2}": stage for i, stage in enumerate(model.stages)}
        for name, module in (modules | {"head": model.forward_head}).items():
            parts[name] = (module, x)
            x = module(x)
    return parts | {"the whole": (model, images)}


def _timed(work: Callable[[], float], scale: float = 1.0) -> Callable[[int], float]:
    """Milliseconds of the fastest of three, divided by ``scale``."""
    return lambda _: 1e3 * min(work() for _ in range(3)) / scale


def _ceilings(device: torch.device, dtype: torch.dtype, side: int = 4096, count: int = 2**26) -> dict[str, Any]:
    """Milliseconds of a FLOP, two for a multiply-add as FlopCounterMode counts, and of a byte read or written."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out, source, target = torch.empty_like(a), torch.zeros(count, device=device), torch.zeros(count, device=device)
    product = partial(seconds, lambda _: torch.mm(a, b, out=out), a)
    copy = partial(seconds, target.copy_, source)
    return {PRODUCT: _timed(product, 2 * side**3), COPY: _timed(copy, 8 * count)}


def _needs(part: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """FLOPs of a part, and bytes of its blocks' maps and weights, or of its own map where it has none."""
    blocks = [m for m in part.modules() if isinstance(m, Block)] if isinstance(part, nn.Module) else []
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
    return counter.get_total_flops(), sum(moved) or (x.numel() + out.numel()) * out.element_size()


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
        if gpu and event.device_type != DeviceType.CUDA:
            continue  # an operator, whose kernels follow
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        kind = next((k for k, names in KINDS.items() if any(n in event.key for n in names)), "all else")
        spent[kind] += microseconds / 1e3 / passes
    return {kind: [spent[kind]] for kind, _ in spent.most_common() if spent[kind] > 0}
