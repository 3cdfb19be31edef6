"""Classify image files with a trained checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hatnet_core.commands import pick_device
from hatnet_train.classifier import Classifier
from hatnet_train.data.images import SUFFIXES, read_image

BATCH_SIZE = 32


def predict(
    classifier: Classifier, images: Sequence[Path], top_k: int = 1, device: str = "auto"
) -> list[dict[str, Any]]:
    """Classify images.

    Args:
        classifier: of :func:`hatnet_train.classifier.load_classifier`.
        images: image files in any format that Pillow reads, or folders of them.
        top_k: how many classes to return an image, best first.
        device: as for :func:`hatnet_core.commands.pick_device`.

    Returns:
        One dict an image: ``image`` (the path), ``classes`` (names) and ``probabilities``, both of length ``top_k``.

    Raises:
        FileNotFoundError: if an image is not there.
        ValueError: if one cannot be read, a folder holds none, ``top_k`` is not between 1 and the number of classes,
            or there is no such device.
    """
    images = [file for path in images for file in _files(path)]
    names = classifier.classes
    if not 1 <= top_k <= len(names):
        raise ValueError(f"top_k must be from 1 to the {len(names)} classes, got {top_k}")
    target = pick_device(device)
    model = classifier.model.to(target)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(images), BATCH_SIZE), "predict", delay=2, leave=False, disable=None):
            paths = images[start : start + BATCH_SIZE]
            batch = torch.stack([classifier.preprocess(read_image(path)) for path in paths]).to(target)
            best = model(batch).softmax(-1).topk(top_k)
            for path, indices, values in zip(paths, best.indices.tolist(), best.values.tolist(), strict=True):
                rows.append({"image": str(path), "classes": [names[i] for i in indices], "probabilities": values})
    return rows


def _files(path: Path) -> list[Path]:
    """The images of a folder and those below it, in order; of any other path itself."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise ValueError(f"folder {path} holds no images: expected files that end in {', '.join(sorted(SUFFIXES))}")
    return found
