"""Classify image files with a trained checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hatnet_core import HATNet, load_checkpoint, read_metadata
from hatnet_core.model import MIN_SIZE
from hatnet_train.data import preprocess, read_image

BATCH_SIZE = 32


def predict(checkpoint: Path, images: Sequence[Path], top_k: int = 1) -> list[dict[str, Any]]:
    """Classify images with a ``model.safetensors`` of hatnet-train.

    Args:
        checkpoint: the file; it says which model, image size and class names.
        images: image files in any format that Pillow reads.
        top_k: how many classes to return an image, best first.

    Returns:
        One dict an image: ``image`` (the path), ``classes`` (names) and ``probabilities``, both of length ``top_k``.

    Raises:
        FileNotFoundError: if the checkpoint or an image is not there.
        ValueError: if one cannot be read, or ``top_k`` is not between 1 and the number of classes.
    """
    model, record = _load(checkpoint)
    classes, normalisation = record["classes"], (record["image_size"], record["mean"], record["std"])
    if not 1 <= top_k <= len(classes):
        raise ValueError(f"top-k must be from 1 to the {len(classes)} classes, got {top_k}")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(images), BATCH_SIZE), "predict", delay=2, leave=False, disable=None):
            paths = images[start : start + BATCH_SIZE]
            batch = torch.stack([preprocess(read_image(path), *normalisation) for path in paths])
            best = model(batch).softmax(-1).topk(top_k)
            for path, indices, values in zip(paths, best.indices.tolist(), best.values.tolist(), strict=True):
                names = [classes[i] for i in indices]
                rows.append({"image": str(path), "classes": names, "probabilities": values})
    return rows


def _load(checkpoint: Path) -> tuple[HATNet, dict[str, Any]]:
    """The model in evaluation mode, and the record that describes its classes and preprocessing."""
    record = read_metadata(checkpoint)
    try:
        model = HATNet(**record["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint} holds a configuration that builds no HAT-Net: {error}") from error
    classes, size, std = record.get("classes"), record.get("image_size"), record.get("std")
    usable = {
        "classes": isinstance(classes, list) and len(classes) == model.num_classes > 0,
        "image_size": type(size) is int and size >= MIN_SIZE,
        "mean": isinstance(record.get("mean"), float),
        "std": isinstance(std, float) and std > 0,
    }
    wrong = [name for name, holds in usable.items() if not holds]
    if wrong:
        raise ValueError(
            f"{checkpoint} has no usable {', '.join(wrong)}; expected a model.safetensors of hatnet-train"
        )
    load_checkpoint(model, checkpoint)
    return model.eval(), record
