"""Time every operation of HAT-Net-Small at batch 128 on the GPU alone, next to its alternatives and the roofline.

The roofline is the larger of bytes over the measured copy rate (each input read once, each output written once) and
FLOPs over the measured rate of a large matrix product. Rows go to $OUT/kernels.jsonl, the longest kernels of whole
passes to $OUT/profile.txt.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import DEVICE, DRY, OUT, build, channels_last, kernel_milliseconds, record, say, synchronize
from throughput import BATCH, SIZE, training_step
from torch import Tensor

from hatnet_core.kernels import triton_attention, triton_depthwise, triton_group_norm, triton_pool

DTYPE = torch.bfloat16
STAGES = (
    [(4, 16, 1, 3, 4, 2)]
    if DRY
    else [(56, 64, 8, 3, 8, 8), (28, 128, 8, 3, 7, 4), (14, 320, 4, 3, 7, 2), (7, 512, 4, 3, 0, 0)]
)
"""Side of the map, C, E, K, G1, G2 of each stage of HAT-Net-Small; no grids in the last."""

HEAD_DIM = 16 if DRY else 64

draw = partial(channels_last, dtype=DTYPE)


class Roofline:
    """Times an operation and compares it with this GPU's measured ceilings."""

    def __init__(self) -> None:
        side, count = (64, 2**16) if DRY else (8192, 2**30)
        a, b, out = (draw(side, side) for _ in range(3))
        source, target = (torch.empty(count, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2))
        self.flops = 2e3 * side**3 / kernel_milliseconds(lambda: torch.mm(a, b, out=out))
        self.bytes = 2e3 * count / kernel_milliseconds(lambda: target.copy_(source))
        say(f"ceilings: {self.bytes / 1e12:.2f} TB/s copied, {self.flops / 1e12:.0f} TFLOP/s in bfloat16")
        record("kernels", {"operation": "ceilings", "bytes_per_second": self.bytes, "flops_per_second": self.flops})

    def measure(
        self, stage: int, operation: str, how: str, work: Callable[[], Any], values: float, flops: float = 0
    ) -> None:
        """Print and record a row; ``values`` are read or written at least once, 2 bytes each."""
        row: dict[str, Any] = {"stage": stage, "operation": operation, "how": how}
        try:
            ms = kernel_milliseconds(work)
        except Exception as error:  # a shape that a library does not take, or a capture that failed
            record("kernels", row | {"error": str(error)[:300]})
            say(f"stage {stage} {operation:22s} {how:24s} {str(error)[:80]}")
            return
        share = 1e3 * max(2 * values / self.bytes, flops / self.flops) / ms
        record("kernels", row | {"ms": ms, "bytes": 2 * values, "flops": flops, "roofline": share})
        say(f"stage {stage} {operation:22s} {how:24s} {ms:8.3f} ms {2 * values / ms / 1e9:6.2f} TB/s {share:5.0%}")


def both(forward: Callable[..., Tensor], *tensors: Tensor) -> Callable[[], Any]:
    """Forward and backward of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    given = torch.randn_like(forward(*leaves))
    return lambda: torch.autograd.grad(forward(*leaves), leaves, given)


def measure_stage(roofline: Roofline, stage: int, side: int, c: int, e: int, k: int, grid: int, pool: int) -> None:
    """All operations of one stage; bytes of forward and backward are those of a perfect kernel for each."""
    measure = partial(roofline.measure, stage)
    h, taps = draw(BATCH, e * c, side, side), draw(e * c, 1, k, k)
    inner = [("Triton", triton_depthwise.activated_depthwise), ("PyTorch", partial(mixed, k=k))]
    for how, function in inner:
        measure("SiLU, depthwise, SiLU", how, partial(function, h, taps), 2 * h.numel(), 2 * h.numel() * k * k)
        measure("… and backward", how, both(function, h, taps), 7 * h.numel(), 6 * h.numel() * k * k)
    x, weight, bias = draw(BATCH, c, side, side), draw(c), draw(c)
    n = x.numel()
    norms = [
        ("Triton", partial(triton_group_norm.group_norm, eps=1e-6)),
        ("PyTorch", lambda x, w, b: F.group_norm(x, 1, w, b, 1e-6)),
    ]
    for how, norm in norms:
        measure("GroupNorm", how, partial(norm, x, weight, bias), 3 * n)
        measure("… and backward", how, both(norm, x, weight, bias), 8 * n)
    for inputs, outputs in ((c, 3 * c), (c, e * c), (e * c, c), (c, c)):
        y, w = draw(BATCH, inputs, side, side), draw(outputs, inputs, 1, 1)
        values, flops = BATCH * side**2 * (inputs + outputs), 2 * BATCH * side**2 * inputs * outputs
        b = draw(outputs) if inputs == c and outputs != e * c else None
        for how, product in (("linear", linear), ("convolution", F.conv2d)):
            measure(f"1×1, {inputs} to {outputs}", how, partial(product, y, w, b), values, flops)
            measure("… and backward", how, both(partial(product, bias=b), y, w), 3 * values, 3 * flops)
    if not grid:
        return
    heads, qkv, m = c // HEAD_DIM, draw(BATCH, 3 * c, side, side), side // pool
    within = partial(triton_attention.grid_attention, num_heads=heads, grid_size=grid)
    measure("grid attention + X", "Triton", partial(within, qkv, residual=x), 5 * n, 4 * n * grid**2)
    measure("… and backward", "Triton", both(within, qkv), 11 * n, 14 * n * grid**2)
    q, kk, v = draw(3, BATCH * side**2 // grid**2, grid**2, heads, HEAD_DIM).transpose(2, 3)
    sdpa = F.scaled_dot_product_attention
    measure("grid attention", "SDPA, copies excluded", partial(sdpa, q, kk, v), 4 * n, 4 * n * grid**2)
    kv = draw(BATCH, 2 * c, m, m)
    pooled = partial(triton_attention.pooled_attention, num_heads=heads)
    measure("pooled attention + A1", "Triton", partial(pooled, x, kv, residual=x), 3 * n, 4 * n * m * m)
    measure("… and backward", "Triton", both(pooled, x, kv), 5 * n, 14 * n * m * m)
    q = x.flatten(2).transpose(1, 2).unflatten(2, (heads, HEAD_DIM)).transpose(1, 2)
    kk, v = draw(2, BATCH, m * m, heads, HEAD_DIM).transpose(2, 3)
    measure("pooled attention", "SDPA", partial(sdpa, q, kk, v), 2 * n, 4 * n * m * m)
    pools = [("Triton", triton_pool.average_pool), ("PyTorch", F.avg_pool2d)]
    for how, function in pools:
        measure("average pool", how, partial(function, x, pool), n)
        measure("… and backward", how, both(lambda x, function=function: function(x, pool), x), 2 * n)


def mixed(h: Tensor, weight: Tensor, k: int) -> Tensor:
    """SiLU, depthwise convolution, SiLU by PyTorch."""
    return F.silu(F.conv2d(F.silu(h), weight, padding=k // 2, groups=h.shape[1]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a 1×1 convolution as a linear layer over channels_last memory."""
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def profile_passes() -> None:
    """Record the longest kernels of inference and training, and the share of the time in which the GPU computes."""
    from torch.profiler import ProfilerActivity, profile

    name = "hatnet_tiny" if DRY else "hatnet_small"
    dtype = torch.float32 if DRY else DTYPE
    model = build(name, "triton").eval().to(dtype)
    images = channels_last(BATCH, 3, SIZE, SIZE, dtype=dtype)
    step = training_step(build(name, "triton").train(), BATCH)
    with torch.no_grad():
        passes: list[tuple[str, Callable[[], Any]]] = [
            ("inference", lambda: model(images)),
            ("inference, batch 1", lambda: model(images[:1])),
            ("training", torch.enable_grad()(step)),
        ]
        for what, run in passes:
            for _ in range(1 if DRY else 3):
                run()
            synchronize()
            with profile(activities=[ProfilerActivity.CPU, *([] if DRY else [ProfilerActivity.CUDA])]) as profiler:
                run()
                synchronize()
            events = profiler.key_averages()
            kernels = [event for event in events if event.device_type.name == "CUDA"]
            busy, launches = sum(e.self_device_time_total for e in kernels) / 1e3, sum(e.count for e in kernels)
            operators = sum(e.count for e in events if e.key.startswith(("aten::", "hatnet::")))
            say(f"{what}: kernels {busy:.2f} ms in {launches} launches, {operators} operator calls")
            record("kernels", {"operation": "profile", "how": what, "busy_ms": busy, "launches": launches})
            with (OUT / "profile.txt").open("a") as file:
                file.write(f"\n== {what}: kernels {busy:.2f} ms in {launches} launches\n")
                for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:40]:
                    file.write(f"{e.self_device_time_total / 1e3:9.3f} ms {e.count:5d} {e.key[:140]}\n")


def main() -> None:
    """Ceilings, then profiles, then stage by stage."""
    roofline = Roofline()
    torch.backends.cudnn.benchmark = True
    profile_passes()
    for stage, shape in enumerate(STAGES, 2):
        measure_stage(roofline, stage, *shape)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
