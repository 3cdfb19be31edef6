"""H-MHSA against shifted windows on CIFAR-10 with one recipe and several seeds: the question of the paper's Table 5.

    python benchmarks/gpu/accuracy.py --data cifar10 --minutes 8

All runs train at once on one GPU, each in a process, for the same number of epochs: as many as fit the time. With one
seed both kinds of attention see the same images, in the same order, with the same crops. Writes $OUT/accuracy.json,
with the curves, and $OUT/accuracy.md.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common import DEVICE, DRY, OUT, in_turn, say
from PIL import Image
from torch import Tensor, nn

from hatnet_core import HATNet

KINDS = {"H-MHSA": "hierarchical", "windows": "window"}
"""Attention of stages 2-4: the last and the first row of Table 5."""


class Run(NamedTuple):
    """One training run; ``until`` is the time (of ``time.time``) at which all runs end."""

    data: str
    kind: str
    seed: int
    batch: int
    lr: float
    drop_path: float
    epochs: int
    until: float


def read(archive: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] uint8 and labels [N] of a tar.gz with members SPLIT/CLASS/FILE; noise in a dry run."""
    if DRY:
        return torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 4
    images, names = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None:
                images.append(np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB")))
                names.append(member.name.split("/")[-2])
    number = {name: i for i, name in enumerate(sorted(set(names)))}
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return pixels.to(DEVICE), torch.tensor([number[name] for name in names], device=DEVICE)


def batches(run: Run, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless batches, shuffled, cropped from a border of an eighth, and flipped, by the seed alone."""
    draw = torch.Generator().manual_seed(run.seed)
    side, border = images.shape[-1], images.shape[-1] // 8
    padded, along = F.pad(images, (border,) * 4), torch.arange(side, device=DEVICE)
    while True:
        order = torch.randperm(len(images), generator=draw)
        for index in order.split(run.batch)[: max(1, len(images) // run.batch)]:
            top, left = torch.randint(2 * border + 1, (2, len(index), 1), generator=draw).to(DEVICE)
            flip = (torch.rand(len(index), 1, generator=draw) < 0.5).to(DEVICE)
            chosen = index.to(DEVICE)
            rows, columns = top + along, left + torch.where(flip, along.flip(0), along)
            x = padded[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            yield x.permute(0, 3, 1, 2), labels[chosen]


def build(run: Run, classes: int) -> nn.Module:
    """HAT-Net-Tiny whose stem has stride 1, so that 32 pixels leave maps of 32, 16, 8 and 4."""
    torch.manual_seed(run.seed)
    size: dict[str, Any] = {"embed_dims": (48, 96, 240, 384), "depths": (2, 2, 6, 3), "head_dim": 48}
    if DRY:
        size = {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 1), "head_dim": 16, "mlp_ratios": (2, 2, 2, 2)}
    attention = (KINDS[run.kind],) * 3
    model = HATNet(**size, attention=attention, num_classes=classes, drop_rate=0.0, drop_path_rate=run.drop_path)
    model.stem.conv1.stride = model.stem.conv2.stride = (1, 1)
    return model.to(DEVICE, memory_format=torch.channels_last)


def prepare(run: Run) -> Callable[[], dict[str, Any]]:
    """Read the data and train: runs share the GPU, and none is timed alone."""
    (images, labels), (test_images, test_labels) = (read(Path(run.data) / f"{s}.tar.gz") for s in ("train", "val"))
    scaled = images.float() / 255
    mean, std = scaled.mean((0, 2, 3), keepdim=True), scaled.std((0, 2, 3), keepdim=True)
    del scaled

    def normalise(x: Tensor) -> Tensor:
        return ((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    model = build(run, int(labels.max()) + 1)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=run.lr, fused=True)
    data, steps = batches(run, images, labels), max(1, len(images) // run.batch)
    total, curve, start = run.epochs * steps, [], time.time()
    for step in range(total):
        done = step / total
        rate = done / 0.05 if done < 0.05 else 0.5 * (1 + math.cos(math.pi * (done - 0.05) / 0.95))
        for group in optimizer.param_groups:
            group["lr"] = run.lr * max(rate, 1e-3)
        x, target = next(data)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
            loss = F.cross_entropy(model(normalise(x)).float(), target, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        late = time.time() > run.until
        if (step + 1) % (steps * max(1, run.epochs // 10)) == 0 or step + 1 == total or late:
            top1 = _top1(model, normalise, test_images, test_labels)
            curve.append({"epoch": (step + 1) / steps, "loss": loss.item(), "top1": top1})
        if late:
            break
    row = {**run._asdict(), "finished": step + 1 == total, "seconds": time.time() - start, "curve": curve}
    return partial(dict, row, top1=curve[-1]["top1"], parameters=sum(p.numel() for p in model.parameters()))


@torch.no_grad()
def _top1(model: nn.Module, normalise: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    model.eval()
    correct = 0
    for x, target in zip(images.split(1000), labels.split(1000), strict=True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=not DRY):
            correct += int((model(normalise(x)).argmax(1) == target).sum())
    model.train()
    return 100 * correct / len(labels)


def table(rows: list[dict[str, Any]]) -> str:
    """Top-1 by kind with its spread, and the difference seed by seed."""
    lines = ["| attention | mean top-1 | deviation | each seed |", "|---|---:|---:|---|"]
    by_kind = {kind: {row["seed"]: row["top1"] for row in rows if row["kind"] == kind} for kind in KINDS}
    for kind, found in by_kind.items():
        values = [found[seed] for seed in sorted(found)]
        deviation = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        mean = f"{statistics.mean(values):.2f}" if values else "no result"
        lines.append(f"| {kind} | {mean} | {deviation} | {', '.join(f'{value:.2f}' for value in values)} |")
    ours, windows = by_kind.values()
    gaps = [f"{ours[seed] - windows[seed]:+.2f}" for seed in sorted(ours.keys() & windows.keys())]
    return "\n".join([*lines, "", f"H-MHSA minus windows, seed by seed: {', '.join(gaps)} points.", ""])


def main() -> int:
    """Return 1 if a run did not finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=".", help="folder with train.tar.gz and val.tar.gz (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="of every run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs per kind of attention (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=256, help="images per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--drop-path", type=float, default=0.1, help="stochastic depth (default: %(default)s)")
    options = parser.parse_args()
    seconds = 3600 if DRY else 60 * options.minutes
    common = (options.batch, options.lr, options.drop_path, options.epochs, time.time() + seconds - 20)
    jobs = [Run(options.data, kind, seed, *common) for seed in range(options.seeds) for kind in KINDS]
    rows = [row for _, row in in_turn(prepare, jobs, prepare_s=seconds, work_s=10) if row is not None]
    for row in rows:
        say(f"{row['kind']:8s} seed {row['seed']}: top-1 {row['top1']:.2f} %, finished: {row['finished']}")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "accuracy.json").write_text(json.dumps({"options": vars(options), "runs": rows}, indent=1))
    (OUT / "accuracy.md").write_text(table(rows))
    print(table(rows))
    return int(len(rows) < len(jobs) or not all(row["finished"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
