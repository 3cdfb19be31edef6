"""The run of ``hatnet-eval``: a checkpoint on held-out images, on one process or many."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from hatnet_core.variants import MIN_SIZE
from hatnet_train.accuracy import evaluate
from hatnet_train.classifier import Classifier, load_classifier
from hatnet_train.config import MAX_SIZE, MAX_WORKERS
from hatnet_train.data import Source, log_usage, open_split
from hatnet_train.data.folder import refuse
from hatnet_train.data.loader import Batch, evaluation_batches
from hatnet_train.deepspeed_json import AUTOCAST_DTYPES
from hatnet_train.launch import discover, joined
from hatnet_train.preflight import code_digest, compare, raise_together


def evaluation_run(
    checkpoint: Path,
    data: str,
    *,
    variant: str | None,
    size: int | None,
    batch_size: int,
    workers: int,
    precision: str,
    timeout: float,
    on_bad: Callable[[str], object] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a checkpoint; in every process of a launch.

    Args:
        checkpoint: see :func:`hatnet_train.classifier.load_classifier`.
        data: see :func:`hatnet_train.data.open_split`.
        variant: the model, for files that do not say.
        size: side of the input in pixels; None for that of the training.
        batch_size: images a batch and process.
        workers: data workers a process.
        precision: bf16 or fp16 through autocast, or fp32.
        timeout: seconds to wait for other processes.
        on_bad: called with the reason for each image of this process that cannot be read and is not counted; by
            default that is raised.

    Returns:
        On rank 0: ``checkpoint``, ``data``, ``size``, ``images``, ``bad_images`` (not counted), ``top1`` and ``top5``
        (percent), ``loss`` (cross entropy), ``images_per_second``, ``world_size``, ``precision``; None on the others.

    Raises:
        FileNotFoundError: if checkpoint or data is not there.
        ValueError: if one of them, or a value, is not as expected, or their classes differ.
    """
    for name, value, low, high in (("batch_size", batch_size, 1, 2**31), ("workers", workers, 0, MAX_WORKERS)):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    if size is not None and not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size must be from {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
    dtype = AUTOCAST_DTYPES.get(precision)
    with joined(discover(os.environ), timeout):
        classifier, held_out = _open_together(checkpoint, data, variant, size)
        size = size or classifier.image_size
        rank, world_size = dist.get_rank(), dist.get_world_size()
        device = torch.device(get_accelerator().current_device_name())
        batches = evaluation_batches(
            held_out,
            size=size,
            crop_fraction=classifier.crop_fraction,
            batch_size=batch_size,
            workers=workers,
            rank=rank,
            world_size=world_size,
            skip_bad=on_bad is not None,
        )
        bad = torch.zeros(1, dtype=torch.int64, device=device)

        def report(batch: Batch) -> None:
            for problem in batch.bad:
                (on_bad or refuse)(problem)
            bad.add_(len(batch.bad))

        start = time.perf_counter()
        precise = torch.autocast(device.type, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
        with precise, contextlib.closing(batches):
            models = [classifier.model.to(device)]
            (metrics,) = evaluate(models, batches, device, mean=classifier.mean, std=classifier.std, between=report)
        seconds = time.perf_counter() - start
        dist.all_reduce(bad)
    if rank:
        return None
    return {
        "checkpoint": str(checkpoint),
        "data": data,
        "size": size,
        "images": metrics["eval_images"],
        "bad_images": int(bad),
        "top1": metrics["top1"],
        "top5": metrics["top5"],
        "loss": metrics["eval_loss"],
        "images_per_second": metrics["eval_images"] / seconds,
        "world_size": world_size,
        "precision": precision,
    }


def _open_together(checkpoint: Path, data: str, variant: str | None, size: int | None) -> tuple[Classifier, Source]:
    """Checkpoint and images, the same on all ranks; what is wrong with them on one is raised on all."""
    opened: list[tuple[Classifier, Source]] = []
    problem = None
    try:
        classifier = load_classifier(checkpoint, variant)
        names = classifier.classes if classifier.named else None
        held_out = open_split(data, train=False, size=size or classifier.image_size, classes=names)
        _check_classes(classifier, held_out, checkpoint, data)
        opened.append((classifier, held_out))
    except (ValueError, OSError, ImportError) as error:
        problem = str(error)
    raise_together(problem)
    weights = hashlib.sha256()
    for tensor in opened[0][0].model.state_dict().values():
        weights.update(tensor.numpy().tobytes())
    digests = {"weights": weights.hexdigest()[:16], "held-out data": opened[0][1].digest()[:16]}
    compare({"code": code_digest()[:16], **digests})
    if dist.get_rank() == 0:
        log_usage(opened[0][1])
    return opened[0]


def _check_classes(classifier: Classifier, held_out: Source, checkpoint: Path, data: str) -> None:
    ours, theirs = classifier.classes, held_out.classes
    if len(ours) != len(theirs):
        raise ValueError(
            f"{data} must have the {len(ours)} classes of {checkpoint}, got {len(theirs)}: evaluate on the data it "
            f"was trained for, or train for this data: hatnet-train --init {checkpoint}"
        )
    if classifier.named and (different := [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]):
        raise ValueError(
            f"{checkpoint} and {data} name {len(different)} classes differently, first {' and '.join(different[0])}"
        )
