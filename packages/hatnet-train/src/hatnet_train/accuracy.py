"""Top-1, top-5 and loss over held-out images, each counted once, whatever the number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from torch import Tensor

from hatnet_train.config import TrainConfig
from hatnet_train.data import Source
from hatnet_train.data.augment import MEAN, STD, normalise
from hatnet_train.data.loader import Batch, evaluation_batches
from hatnet_train.engine import autocast
from hatnet_train.launch import AgreedError
from hatnet_train.weights import Ema, whole_model


def held_out_metrics(
    engine: deepspeed.DeepSpeedEngine,
    ema: Ema | None,
    held_out: Source,
    config: TrainConfig,
    *,
    between: Callable[[Batch], None],
) -> dict[str, Any]:
    """Evaluate the weights of a training run, and their average; all ranks have to call it.

    Args:
        engine: engine with the weights.
        ema: their average.
        held_out: images to evaluate with.
        config: the run.
        between: called with every batch, after it.
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
        measured, *averaged = evaluate(models, batches, engine.device, dtype, between=between)
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
) -> list[dict[str, Any]]:
    """Run every model over this rank's batches, which are read once; all ranks have to call it with as many.

    Args:
        models: each from images [B, 3, S, S] to logits [B, K]; in evaluation mode.
        batches: of :func:`hatnet_train.data.loader.evaluation_batches`.
        device: where the models are.
        dtype: what they take.
        mean: of the normalisation, for values in [0, 1].
        std: likewise.
        between: called with every batch, after it.

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
            for model, total in zip(models, sums, strict=True):
                logits = model(images).float()
                loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-1)
                hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
                total += torch.stack([loss, hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])
            if between is not None:
                between(batch)
    dist.all_reduce(sums)
    if not sums[0, 3]:
        raise AgreedError("none of the held-out images could be read; expected one at least")
    return [
        {"eval_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count, "eval_images": int(count)}
        for loss, top1, top5, count in sums.tolist()
    ]
