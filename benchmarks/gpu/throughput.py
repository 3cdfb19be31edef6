"""Images per second of HAT-Net and its peers in inference and training, and the peak memory of a training step.

Every model is measured in its best documented setting as well as eagerly: HAT-Net and its peers as a CUDA graph and
compiled by inductor. All are in channels_last, inference in bfloat16, training under bfloat16 autocast with AdamW.
Each job is a process; a group prepares and compiles at once and is timed in turn. Rows go to $OUT/throughput.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import DEVICE, DRY, build, channels_last, graphed, in_turn, milliseconds, record, say, synchronize
from torch import nn

BATCH, SIZE = (2, 32) if DRY else (128, 224)
PEERS = ["swin_tiny_patch4_window7_224", "pvt_v2_b2", "convnext_tiny", "twins_svt_small", "resnet50"]
VARIANTS = ["hatnet_tiny", "hatnet_medium", "hatnet_large"]


class Job(NamedTuple):
    """A model, its kernels (triton, plain, or timm) and what is measured: eager, compiled or training compiled."""

    model: str
    kernels: str
    mode: str


SMALL = "hatnet_small"
GROUPS = {
    "small": [
        Job(SMALL, "triton", "eager"),
        *(Job(peer, "timm", "compiled") for peer in PEERS[:2]),
        Job(SMALL, "plain", "eager"),
        *(Job(peer, "timm", "eager") for peer in PEERS[:2]),
    ],
    "compiled": [Job(SMALL, kernels, mode) for kernels in ("triton", "plain") for mode in ("compiled", "training")],
    "training": [Job(peer, "timm", "training") for peer in PEERS[:3]],
    "peers": [Job(peer, "timm", mode) for peer in PEERS[2:] for mode in ("eager", "compiled")],
    "variants": [Job(name, "triton", "eager") for name in VARIANTS],
}
"""Groups in the order of their interest; a group is what the cores of a machine can compile at once."""

if DRY:
    GROUPS = {"small": [Job("hatnet_tiny", "triton", "eager"), Job("resnet10t", "timm", "compiled")]}


def training_step(model: Any, batch: int, capturable: bool = False) -> Callable[[], None]:
    """Forward, backward and AdamW on one batch of noise."""
    parameters: list[nn.Parameter] = list(model.parameters())
    images = channels_last(batch, 3, SIZE, SIZE, dtype=torch.float32)
    labels = torch.randint(1000, (batch,), device=DEVICE)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=capturable and not DRY)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def prepare(job: Job) -> Callable[[], list[dict[str, Any]]]:
    """Build the model and compile what it needs; return what times it."""
    start = time.perf_counter()
    dtype = torch.float32 if DRY else torch.bfloat16
    model: Any = build(job.model, job.kernels)
    if job.mode == "eager":
        model.eval().to(dtype)
        with torch.inference_mode():
            model(channels_last(1, 3, SIZE, SIZE, dtype=dtype))  # compiles the Triton kernels
        training_step(model.train().float(), 2)()
    else:
        compiled = torch.compile(model, dynamic=False, backend="eager" if DRY else "inductor")
        if job.mode == "training":
            training_step(compiled.train(), BATCH)()
        else:
            compiled.eval().to(dtype)
            with torch.inference_mode():
                compiled(channels_last(BATCH, 3, SIZE, SIZE, dtype=dtype))
        model = compiled
    seconds = round(time.perf_counter() - start, 1)
    return partial(work, job, model, dtype, seconds)


def work(job: Job, model: Any, dtype: torch.dtype, prepare_s: float) -> list[dict[str, Any]]:
    """Time everything the job asks for."""
    torch.backends.cudnn.benchmark = True  # only now, when nothing else runs
    rows: list[dict[str, Any]] = []

    def add(what: str, batch: int, make: Callable[[], Callable[[], Any]]) -> None:
        row: dict[str, Any] = {**job._asdict(), "what": what, "batch": batch, "prepare_s": prepare_s}
        try:
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            ms = milliseconds(make())
            row |= {"ms": round(ms, 3), "images_per_second": round(1e3 * batch / ms, 1)}
            if DEVICE.type == "cuda" and what.startswith("training"):
                row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        except RuntimeError as error:  # out of memory, or a capture that failed
            row["error"] = str(error)[:300]
        rows.append(row)

    if job.mode != "training":
        name = "inference, compiled" if job.mode == "compiled" else "inference"
        model.eval().to(dtype)
        with torch.inference_mode():
            for batch in (BATCH,) if job.mode == "compiled" else (BATCH, 1):
                images = channels_last(batch, 3, SIZE, SIZE, dtype=dtype)
                forward = partial(model, images)
                add(name, batch, lambda forward=forward: forward)
                if job.mode == "eager":
                    add("inference, CUDA graph", batch, lambda forward=forward: graphed(forward))
    if job.mode != "compiled":
        model.train().float()
        compiled = job.mode == "training"
        add("training, compiled" if compiled else "training", BATCH, lambda: training_step(model, BATCH))
        if not compiled:
            add("training, CUDA graph", BATCH, lambda: graphed(training_step(model, BATCH, capturable=True)))
    synchronize()
    return rows


def main() -> None:
    """Measure groups until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=500, help="no group begins later than 100 s before the end")
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=f"out of {', '.join(GROUPS)} (default: all)")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    for group in options.groups:
        left = end - time.monotonic()
        if left < 100 and not DRY:
            say(f"group {group} skipped: {left:.0f} s left")
            continue
        for job, rows in in_turn(prepare, GROUPS[group], prepare_s=min(150, left - 60), work_s=30):
            for row in rows or [{**job._asdict(), "error": "no result in time"}]:
                record("throughput", row)
                shown = f"{row['images_per_second']:8.0f} images/s" if "ms" in row else row["error"]
                memory = f"{row['peak_gb']:6.2f} GB" if "peak_gb" in row else ""
                label = f"{job.model} {job.kernels} {row.get('what', job.mode)}"
                say(f"{label:60s} {row.get('batch', ''):>4} {shown} {memory}")


if __name__ == "__main__":
    main()
