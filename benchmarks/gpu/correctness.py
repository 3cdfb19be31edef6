"""Compare every Triton kernel with float64 over the real shapes of the four variants, forward and backward.

An error is ‖found - expected‖ / ‖expected‖. Every kernel runs twice, which must agree bit for bit; those of the large
maps also run forward on more than 2³¹ values. Whole models are compared with the plain layers in the same precision,
and with a CUDA graph and a compiled copy of themselves. Rows go to $OUT/correctness.jsonl.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import DEVICE, DRY, DTYPES, channels_last, graphed, in_turn, record, say, synchronize
from torch import Tensor

from hatnet_core import create_model, list_models, set_kernels
from hatnet_core.kernels import triton_attention, triton_depthwise, triton_group_norm, triton_pool

SIZES = [(32, 32)] if DRY else [(224, 224), (256, 320), (800, 1280)]
LIMITS = {"fp32": 2e-5, "bf16": 1.2e-2, "fp16": 2e-3}
"""Largest relative error; 2.5 times as much for gradients in half precision, which pass through a rounded map."""

OPERATORS = ["norm", "depthwise", "grid", "pooled", "pool"]
TINY = {
    "norm": (1, 16, 3, 4),
    "depthwise": (1, 16, 2, 3, 3),
    "grid": (1, 1, 16, 4, 5, 4),
    "pooled": (1, 1, 16, 4, 4, 2),
    "pool": (1, 1, 16, 5, 4, 2),
}
"""Shapes of a dry run, which interprets the kernels."""


def shapes(operator: str) -> list[tuple[int, ...]]:
    """Shapes without repetition: (B, C, H, W), (B, E·C, H, W, K), or (B, heads, head_dim, H, W, G1 or G2)."""
    if DRY:
        return [TINY[operator]]
    found: set[tuple[int, ...]] = set()
    for name in list_models():
        with torch.device("meta"):
            config = create_model(name).config
        for height, width in SIZES:
            batch = 1 if height > 500 else 3
            if operator == "norm":
                found.add((batch, 16, height // 2, width // 2))
            for i, dim in enumerate(config["embed_dims"]):
                h, w = -(-height // 4 // 2**i), -(-width // 4 // 2**i)
                heads = (dim // config["head_dim"], config["head_dim"])
                if operator == "norm":
                    found.add((batch, dim, h, w))
                elif operator == "depthwise":
                    found.add((batch, dim * config["mlp_ratios"][i], h, w, config["kernel_sizes"][i]))
                elif i < 3 and operator == "grid":
                    found |= {(batch, *heads, h, w, grid) for grid in {config["grid_sizes"][i], 8}}
                elif i < 3:
                    found.add((batch, *heads, h, w, config["pool_sizes"][i]))
    return sorted(found)


def within_grids(qkv: Tensor, heads: int, grid: int) -> Tensor:
    """Eq. 6-8 in the dtype of ``qkv``."""
    b, c, h, w = qkv.shape
    gh, gw = min(grid, h), min(grid, w)
    rows, columns = -(-h // gh), -(-w // gw)
    padding = (0, columns * gw - w, 0, rows * gh - h)
    x = F.pad(qkv, padding).reshape(b, 3, heads, c // (3 * heads), rows, gh, columns, gw)
    q, k, v = x.permute(1, 0, 4, 6, 2, 5, 7, 3).flatten(5, 6)
    exists = F.pad(qkv.new_ones(h, w), padding).bool().reshape(rows, gh, columns, gw)
    exists = exists.transpose(1, 2).flatten(2)[None, :, :, None, None]
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(~exists, -torch.inf).softmax(-1)
    out = (weights @ v).unflatten(4, (gh, gw)).permute(0, 3, 6, 1, 4, 2, 5)
    return out.reshape(b, c // 3, rows * gh, columns * gw)[:, :, :h, :w]


def to_pooled(q: Tensor, kv: Tensor, added: Tensor, heads: int) -> Tensor:
    """Eq. 11-13 and A1 + A2, in the dtype of ``q``."""
    k, v = kv.flatten(2).unflatten(1, (2, heads, -1)).unbind(1)
    queries = q.flatten(2).unflatten(1, (heads, -1))
    weights = (queries.transpose(-2, -1) @ k / k.shape[2] ** 0.5).softmax(-1)
    return (weights @ v.transpose(-2, -1)).transpose(-2, -1).flatten(1, 2).unflatten(2, q.shape[2:]) + added


def case(
    operator: str, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Callable[..., Any], Callable[..., Any], list[Tensor]]:
    """Return the kernel, plain PyTorch, and fresh arguments."""
    draw = partial(channels_last, dtype=dtype)
    if operator == "norm":
        weights = [torch.randn(shape[1], device=DEVICE) for _ in range(2)]
        fast = partial(triton_group_norm.group_norm, eps=1e-6)
        return fast, lambda x, w, b: F.group_norm(x, 1, w, b, 1e-6), [draw(*shape) + 2, *weights]
    if operator == "depthwise":
        *size, k = shape
        plain = lambda h, w: F.silu(F.conv2d(F.silu(h), w, padding=k // 2, groups=len(w)))  # noqa: E731
        return triton_depthwise.activated_depthwise, plain, [draw(*size), draw(size[1], 1, k, k) / k]
    batch, heads, head_dim, h, w, size_ = shape
    dim = heads * head_dim
    if operator == "grid":
        fast = partial(triton_attention.grid_attention, num_heads=heads, grid_size=size_)
        return fast, lambda x: within_grids(x, heads, size_), [draw(batch, 3 * dim, h, w)]
    if operator == "pool":
        return (
            partial(triton_pool.average_pool, size=size_),
            partial(F.avg_pool2d, kernel_size=size_, ceil_mode=True),
            [draw(batch, dim, h, w)],
        )
    side = (-(-h // size_), -(-w // size_))
    side = side if side[0] * side[1] <= triton_attention.POOLED_POSITIONS else (7, 7)
    fast = lambda q, kv, added: triton_attention.pooled_attention(q, kv, heads, added)  # noqa: E731
    tensors = [draw(batch, dim, h, w), draw(batch, 2 * dim, *side), draw(batch, dim, h, w)]
    return fast, lambda q, kv, added: to_pooled(q, kv, added, heads), tensors


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; infinite where a value is not finite."""
    error = float((found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())
    return error if error == error else float("inf")


def check_kernel(operator: str, name: str) -> list[dict[str, Any]]:
    """All shapes of an operator in one dtype, forward and gradients."""
    rows = []
    for shape in shapes(operator):
        fast, plain, tensors = case(operator, shape, DTYPES[name])
        tensors = [t.detach().requires_grad_() for t in tensors]
        exact = [t.detach().double().requires_grad_() for t in tensors]
        expected = plain(*exact)
        given = torch.randn_like(expected).to(DTYPES[name])
        wanted = [expected, *torch.autograd.grad(expected, exact, given.double())]
        runs = []
        for _ in range(2):
            out = fast(*tensors)
            runs.append([out, *torch.autograd.grad(out, tensors, given)])
        errors = [relative(a, b) for a, b in zip(runs[0], wanted, strict=True)]
        same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        limit = LIMITS[name]
        ok = errors[0] <= limit and max(errors) <= (limit if name == "fp32" else 2.5 * limit) and same
        rows.append({"shape": shape, "errors": errors, "same_twice": same, "ok": ok})
    return rows


def check_huge(operator: str) -> list[dict[str, Any]]:
    """On more than 2³¹ values the last sample is what it is alone."""
    side, channels = (2, 16) if DRY else (512, 192 if operator == "grid" else 1024)
    batch = 2 if DRY else 2**31 // (side * side * channels) + 2
    shape = {"norm": (batch, channels, side, side), "depthwise": (batch, channels, side, side, 3)}
    fast, _, tensors = case(operator, shape.get(operator, (batch, 1, 64, side, side, 8)), torch.float16)
    with torch.no_grad():
        whole, alone = fast(*tensors)[-1:], fast(tensors[0][-1:], *tensors[1:])
    return [{"values": tensors[0].numel(), "ok": relative(whole, alone) < 1e-3}]


def check_model(variant: str) -> list[dict[str, Any]]:
    """Logits and all gradients against float64; ours may be twice as far from it as the plain layers are."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    with DEVICE:
        model = create_model(variant).eval()
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(2)
    images = torch.randn(1 if DRY else 2, 3, *SIZES[0], device=DEVICE)

    def run(kernels: str, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        set_kernels("auto" if DRY else kernels)
        model.to(torch.float32 if autocast else dtype)
        with torch.autocast(DEVICE.type, dtype, enabled=autocast):
            logits = model(images.to(next(model.parameters()).dtype)).double()
        weighting = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64, device=DEVICE).view_as(logits)
        gradients = torch.autograd.grad((logits * weighting).sum(), list(model.parameters()))
        return [logits.detach(), torch.cat([g.double().flatten() for g in gradients])]

    exact = run("reference", torch.float64, False)
    rows = []
    for name, autocast in [("fp32", False)] if DRY else [("bf16", True), ("fp16", True), ("fp32", False)]:
        errors = {
            kernels: [relative(a, b) for a, b in zip(run(kernels, DTYPES[name], autocast), exact, strict=True)]
            for kernels in ("triton", "plain")
        }
        ok = all(a <= 2 * b + 1e-5 for a, b in zip(errors["triton"], errors["plain"], strict=True))
        rows.append({"dtype": name, "autocast": autocast, **errors, "ok": ok})
    return rows


def check_modes(variant: str) -> list[dict[str, Any]]:
    """Check that a compiled model, another stream and a CUDA graph agree with eager mode."""
    set_kernels("auto" if DRY else "triton")
    torch.manual_seed(0)
    dtype = torch.float32 if DRY else torch.bfloat16
    model = create_model(variant).to(DEVICE, dtype).eval()
    images = torch.randn(1 if DRY else 4, 3, 64, 64, device=DEVICE, dtype=dtype)
    with torch.no_grad():
        backend = "eager" if DRY else "inductor"
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)(images)
        eager = model(images)
        rows = [{"mode": "compiled", "error": relative(compiled, eager), "ok": relative(compiled, eager) < 2e-2}]
        if not DRY:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                elsewhere = model(images)
            synchronize()
            rows.append({"mode": "another stream", "ok": torch.equal(elsewhere, eager)})
            kept: list[Tensor] = []
            graphed(lambda: kept.append(model(images)))()
            synchronize()
            rows.append({"mode": "CUDA graph", "ok": torch.equal(kept[-1], eager)})
    return rows


CHECKS: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "huge": check_huge,
    "model": check_model,
    "modes": check_modes,
}


def prepare(job: tuple[str, str]) -> Callable[[], list[dict[str, Any]]]:
    """Run one check at once, since nothing is timed; return its rows."""
    kind, what = job
    torch.manual_seed(1)
    rows = CHECKS[kind](what) if kind in CHECKS else check_kernel(kind, what)
    return lambda: rows


def main() -> int:
    """Return 1 if a check fails."""
    dtypes = ["fp32"] if DRY else list(DTYPES)
    jobs = [(op, dtype) for op in OPERATORS for dtype in dtypes if (op, dtype) != ("pooled", "fp32")]
    jobs += [("modes", "hatnet_tiny")] + [("model", name) for name in (list_models()[:1] if DRY else list_models())]
    if DRY:
        jobs.append(("pooled", "fp16"))
    failed = 0
    for group, seconds in ((jobs, 150), ([("huge", op) for op in OPERATORS[:3]], 40)):
        for (kind, what), rows in in_turn(prepare, group, prepare_s=seconds, work_s=10):
            rows = rows or [{"ok": False, "error": "no result in time"}]
            ok = all(row["ok"] for row in rows)
            worst = max((max(row["errors"]) for row in rows if "errors" in row), default=0)
            say(f"{'ok  ' if ok else 'FAIL'} {kind:9s} {what:14s} {len(rows)} cases, largest error {worst:.1e}")
            for row in rows if kind == "model" else [row for row in rows if not row["ok"]][:3]:
                say("     ", row)
            record("correctness", {"kind": kind, "what": what, "ok": ok, "rows": rows})
            failed += not ok
    say(f"{failed} of {len(jobs) + 3} checks failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
