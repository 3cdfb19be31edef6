"""Accuracy on held-out images, each counted once: of a training run, and of a checkpoint (``hatnet-eval``)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from hatnet_core.pretrained import RELEASED_CLASSES
from hatnet_core.variants import MIN_SIZE
from hatnet_train.classifier import Classifier, load_classifier
from hatnet_train.config import MAX_SIZE, MAX_WORKERS, TrainConfig
from hatnet_train.data import Source, log_usage, open_split
from hatnet_train.data.augment import MEAN, STD, normalise
from hatnet_train.data.folder import Folder, class_folders, refuse
from hatnet_train.data.loader import Batch, evaluation_batches
from hatnet_train.data.shards import INDEX, read_index
from hatnet_train.deepspeed.ema import Ema
from hatnet_train.deepspeed.engine import autocast
from hatnet_train.deepspeed.partition import whole_model
from hatnet_train.deepspeed.user_json import AUTOCAST_DTYPES
from hatnet_train.distributed.collectives import compare, raise_together
from hatnet_train.distributed.environment import discover
from hatnet_train.distributed.errors import AgreedError
from hatnet_train.distributed.launch import joined
from hatnet_train.distributed.preflight import code_digest
from hatnet_train.page import evaluation_page, imagenet_synsets, write_page
from hatnet_train.results import Predictions, Results, write_per_class


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
    present: bool = False,
    page: Path | None = None,
    per_class: Path | None = None,
    on_bad: Callable[[str], object] | None = None,
) -> dict[str, Any] | None:
    """Evaluate a checkpoint; in every process of a launch.

    Args:
        checkpoint: see :func:`hatnet_train.classifier.load_classifier`.
        data: see :func:`hatnet_train.data.open_split`; or a folder of class folders that the checkpoint knows, such as
            ImageNet-A. Some of the classes are enough.
        variant: the model, for files that do not say.
        size: side of the input in pixels; None for that of the training.
        batch_size: images per batch and process.
        workers: data workers per process.
        precision: bf16 or fp16 through autocast, or fp32.
        timeout: seconds to wait for other processes.
        present: choose among the classes that have images only, as is customary for ImageNet-A and ImageNet-R.
        page: write a page of results to this HTML file, see :mod:`hatnet_train.page`.
        per_class: write the accuracy of every class to this CSV file.
        on_bad: called with the reason for each image of this process that cannot be read and is not counted; by
            default that is raised.

    Returns:
        On rank 0: ``checkpoint``, ``data``, ``size``, ``images``, ``bad_images`` (not counted), ``classes`` (number to
        choose among), ``top1`` and ``top5`` (percent), ``loss`` (cross entropy), ``images_per_second``,
        ``world_size``, ``precision``; None on the others.

    Raises:
        FileNotFoundError: if checkpoint or data is not there.
        ValueError: if one of them, or a value, is not as expected, or their classes differ.
    """
    for name, value, low, high in (("batch_size", batch_size, 1, 2**31), ("workers", workers, 0, MAX_WORKERS)):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    if size is not None and not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"size must be from {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
    with joined(discover(os.environ), timeout):
        classifier, held_out = _open_together(checkpoint, data, variant, size)
        size = size or classifier.image_size
        options = {"size": size, "batch_size": batch_size, "workers": workers}
        start = time.perf_counter()
        metrics, results, bad_images = _measure(classifier, held_out, precision, present, on_bad, **options)
        seconds = time.perf_counter() - start
        world_size = dist.get_world_size()
        if dist.get_rank():
            return None
    row = {
        "checkpoint": str(checkpoint),
        "data": data,
        "size": size,
        "images": metrics["eval_images"],
        "bad_images": bad_images,
        "classes": len(set(held_out.labels.tolist())) if present else len(held_out.classes),
        "top1": metrics["top1"],
        "top5": metrics["top5"],
        "loss": metrics["eval_loss"],
        "images_per_second": metrics["eval_images"] / seconds,
        "world_size": world_size,
        "precision": precision,
    }
    if per_class is not None:
        write_per_class(results, per_class)
    if page is not None:
        write_page(evaluation_page(row, classifier, held_out, results, variant), page)
    return row


def _measure(
    classifier: Classifier,
    held_out: Source,
    precision: str,
    present: bool,
    on_bad: Callable[[str], object] | None,
    *,
    size: int,
    batch_size: int,
    workers: int,
) -> tuple[dict[str, Any], Results, int]:
    """Evaluate on this rank's part; return the metrics and results of all ranks, and how many images are bad."""
    dtype = AUTOCAST_DTYPES.get(precision)
    device = torch.device(get_accelerator().current_device_name())
    batches = evaluation_batches(
        held_out,
        size=size,
        crop_fraction=classifier.crop_fraction,
        batch_size=batch_size,
        workers=workers,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        skip_bad=on_bad is not None,
    )
    bad = torch.zeros(1, dtype=torch.int64, device=device)

    def report(batch: Batch) -> None:
        for problem in batch.bad:
            (on_bad or refuse)(problem)
        bad.add_(len(batch.bad))

    model: Callable[[Tensor], Tensor] = classifier.model.to(device)
    if present:
        absent = sorted(set(range(len(held_out.classes))) - set(held_out.labels.tolist()))
        model = _without(model, torch.tensor(absent, dtype=torch.int64, device=device))
    predictions = Predictions(len(held_out))
    precise = torch.autocast(device.type, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
    with precise, contextlib.closing(batches):
        (metrics,) = evaluate(
            [model],
            batches,
            device,
            mean=classifier.mean,
            std=classifier.std,
            between=report,
            predictions=predictions,
        )
    dist.all_reduce(bad)
    return metrics, predictions.gather(held_out.labels, held_out.classes), int(bad)


def _without(model: Callable[[Tensor], Tensor], absent: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: model(images).index_fill(1, absent, -torch.inf)


def _open_together(checkpoint: Path, data: str, variant: str | None, size: int | None) -> tuple[Classifier, Source]:
    """Open checkpoint and images, the same on all ranks; raise the problems of one on all."""
    opened: list[tuple[Classifier, Source]] = []
    problem = None
    try:
        classifier = load_classifier(checkpoint, variant)
        held_out = _open_held_out(classifier, data, size or classifier.image_size)
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


def _open_held_out(classifier: Classifier, data: str, size: int) -> Source:
    """Open ``val/`` of a data set, or a folder of class folders; some of the classifier's classes are enough."""
    root = Path(data)
    bare = root.is_dir() and not any((root / name).exists() for name in ("train", "val", INDEX))
    found = set(read_index(root).classes) if (root / INDEX).is_file() else set[str]()
    if folder := next((path for path in (root / "val", root) if path.is_dir()), None):
        found = found or set(class_folders(folder, lambda problem: None))
    names = classifier.classes if classifier.named else None
    if names is None and found and len(classifier.classes) == RELEASED_CLASSES and found <= imagenet_synsets().keys():
        names = [*imagenet_synsets()]  # the released weights name no classes, but were trained on these in this order
    if bare and names is not None and found & {*names}:
        return Folder(root, names)
    return open_split(data, train=False, size=size, classes=names)


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


def held_out_metrics(
    engine: deepspeed.DeepSpeedEngine,
    ema: Ema | None,
    held_out: Source,
    config: TrainConfig,
    *,
    between: Callable[[Batch], None],
    predictions: Predictions | None = None,
) -> dict[str, Any]:
    """Evaluate the weights of a training run, and their average; all ranks have to call it.

    Args:
        engine: engine with the weights.
        ema: their average.
        held_out: images to evaluate with.
        config: the run.
        between: called with every batch, after it.
        predictions: receives those of the weights.
    """
    engine.eval()
    dtype = next(engine.module.parameters()).dtype
    models: list[Callable[[Tensor], Tensor]] = [engine]
    if ema is not None:
        models.append(autocast(whole_model(engine, ema.weights()).to(dtype), config, engine.device))
    batches = evaluation_batches(
        held_out,
        size=config.images.image_size,
        crop_fraction=config.images.crop_fraction,
        batch_size=max(1, config.optimisation.batch_size // dist.get_world_size() // config.compute.accumulation),
        workers=config.images.workers,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        skip_bad=config.faults.on_bad_image == "replace",
    )
    with contextlib.closing(batches):
        measured, *averaged = evaluate(models, batches, engine.device, dtype, between=between, predictions=predictions)
    for metrics in averaged:
        measured |= {f"ema_{name}": metrics[name] for name in ("eval_loss", "top1", "top5")}
    return measured


def evaluate(
    models: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[Batch],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    *,
    between: Callable[[Batch], None] | None = None,
    predictions: Predictions | None = None,
) -> list[dict[str, Any]]:
    """Run every model over this rank's batches, which are read once; all ranks have to call it with as many.

    Args:
        models: each from images [B, 3, S, S] to logits [B, K]; in evaluation mode.
        batches: of :func:`hatnet_train.data.loader.evaluation_batches`.
        device: where the models are.
        dtype: what they take.
        mean: mean of the normalisation, for values in [0, 1].
        std: deviation of the normalisation.
        between: called with every batch, after it.
        predictions: receives those of the first model.

    Returns:
        Of each model ``eval_loss`` (cross entropy), ``top1`` and ``top5`` (percent), ``eval_images`` (how many were
        counted), the same on every rank.

    Raises:
        AgreedError: if not one image could be counted.
    """
    sums = torch.zeros(len(models), 4, dtype=torch.float64, device=device)
    with torch.no_grad():
        for batch in batches:
            images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
            images = normalise(images, mean, std).to(dtype)
            for number, (model, total) in enumerate(zip(models, sums, strict=True)):
                logits = model(images).float()
                loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
                top = logits.topk(min(5, logits.shape[1])).indices
                hits = top == labels[:, None]
                total += torch.stack([loss, hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])
                if predictions is not None and number == 0:
                    predictions.add(labels, top[:, 0], logits)
            if between is not None:
                between(batch)
    dist.all_reduce(sums)
    if not sums[0, 3]:
        raise AgreedError("none of the held-out images could be read; expected one at least")
    return [
        {"eval_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "eval_images": int(count)}
        for loss, top1, top5, count in sums.tolist()
    ]
