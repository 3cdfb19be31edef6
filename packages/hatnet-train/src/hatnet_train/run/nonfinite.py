"""Dump of a step whose loss or gradients are not finite, to find the cause."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor

from hatnet_train.data import Source
from hatnet_train.data.order import Share
from hatnet_train.deepspeed.partition import gradients, masters


class NonFiniteError(FloatingPointError):
    """A rank has a loss or gradient that is not finite; raised on all ranks, before the update.

    Attributes:
        step: step of the run, from 0.
        losses: losses of this rank, one per pass.
    """

    def __init__(self, step: int, loss: float, losses: Sequence[float]) -> None:
        super().__init__(f"loss {loss} or gradients are not finite at step {step}")
        self.step = step
        self.losses = losses


def dump(
    folder: Path,
    engine: deepspeed.DeepSpeedEngine,
    share: Share,
    source: Source,
    losses: Sequence[float],
    generators: Mapping[str, Any],
) -> None:
    """Write ``rank-0003.json``: this rank's images and labels, losses, generators, statistics of its tensors.

    Args:
        folder: for this step; created if missing.
        engine: with the gradients of the step.
        share: the images of this rank at this step.
        source: where they come from.
        losses: one a pass.
        generators: what draws of augmentation, dropout and stochastic depth came from.
    """
    images = [
        {"position": position, "image": source.name(i), "label": source.classes[source.labels[i]]}
        for position, i in zip(share.positions.tolist(), share.images.tolist(), strict=True)
    ]
    record = {
        "losses": [str(loss) if loss != loss or abs(loss) == float("inf") else loss for loss in losses],
        "generators": dict(generators),
        "epoch": share.epoch + 1,
        "images": images,
        "gradients": _statistics(list(gradients(engine))),
        "weights": _statistics(masters(engine)),
    }
    folder.parent.mkdir(exist_ok=True)  # but not the run folder above it, should that have vanished
    folder.mkdir(exist_ok=True)
    (folder / f"rank-{dist.get_rank():04d}.json").write_text(json.dumps(record, indent=1) + "\n")


def _statistics(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Count non-finite values, and find the largest of the rest, over the tensors of this rank."""
    bad = sum(int((~t.isfinite()).sum()) for t in tensors)
    finite = [torch.nan_to_num(t.detach().float(), nan=0.0, posinf=0.0, neginf=0.0) for t in tensors]
    return {
        "tensors": len(tensors),
        "values": sum(t.numel() for t in tensors),
        "not_finite": bad,
        "largest": max((float(t.abs().max()) for t in finite if t.numel()), default=0.0),
        "norm": float(torch.stack([t.norm() for t in finite]).norm()) if finite else 0.0,
    }
