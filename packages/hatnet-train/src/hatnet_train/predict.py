"""Classify image files with a trained checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hatnet_core import HATNet, load_checkpoint, read_metadata
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
    record = read_metadata(checkpoint)
    if not isinstance(record.get("classes"), list) or not isinstance(record.get("image_size"), int):
        raise ValueError(f"{checkpoint} names no classes and image size; expected a model.safetensors of hatnet-train")
    classes = record["classes"]
    if not 1 <= top_k <= len(classes):
        raise ValueError(f"top-k must be from 1 to the {len(classes)} classes, got {top_k}")
    model = HATNet(**record["config"])
    load_checkpoint(model, checkpoint)
    model.eval()
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(images), BATCH_SIZE), "predict", delay=2, leave=False):
            paths = images[start : start + BATCH_SIZE]
            batch = torch.stack([preprocess(read_image(path), record["image_size"]) for path in paths])
            best = model(batch).softmax(-1).topk(top_k)
            for path, indices, values in zip(paths, best.indices.tolist(), best.values.tolist(), strict=True):
                names = [classes[i] for i in indices]
                rows.append({"image": str(path), "classes": names, "probabilities": values})
    return rows
