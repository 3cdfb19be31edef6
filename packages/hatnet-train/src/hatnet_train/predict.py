"""Classify image files with a trained checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hatnet_core.devices import pick_device
from hatnet_core.images import IMAGE_SUFFIXES
from hatnet_train.classifier import Classifier
from hatnet_train.data.folder import Report, Skipped, images_under, refuse
from hatnet_train.data.images import read_image

BATCH_SIZE = 32


def predict(
    classifier: Classifier, images: Sequence[Path], top_k: int = 1, device: str = "auto"
) -> list[dict[str, Any]]:
    """Classify images.

    Args:
        classifier: of :func:`hatnet_train.classifier.load_classifier`.
        images: image files in any format that Pillow reads, or folders of them.
        top_k: how many classes to return an image, best first.
        device: as for :func:`hatnet_core.devices.pick_device`.

    Returns:
        One dict an image: ``image`` (the path), ``classes`` (names) and ``probabilities``, both of length ``top_k``.

    Raises:
        FileNotFoundError: if an image is not there.
        ValueError: if one cannot be read, a folder holds none, ``top_k`` is not between 1 and the number of classes,
            or there is no such device.
    """
    files, _ = find_images(images)
    return list(predictions(classifier, files, top_k, device))


def predictions(
    classifier: Classifier,
    files: Sequence[Path],
    top_k: int = 1,
    device: str = "auto",
    on_bad: Callable[[str], object] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the results of :func:`predict` batch by batch.

    Args:
        classifier: of :func:`hatnet_train.classifier.load_classifier`.
        files: image files.
        top_k: how many classes to return an image, best first.
        device: as for :func:`hatnet_core.devices.pick_device`.
        on_bad: called with the reason for each image that cannot be read and is skipped; by default that is raised.

    Raises:
        FileNotFoundError: by default, if an image is not there.
        ValueError: as :func:`predict` does.
    """
    names = classifier.classes
    if not 1 <= top_k <= len(names):
        raise ValueError(f"top_k must be from 1 to the {len(names)} classes, got {top_k}")
    target = pick_device(device)
    model = classifier.model.to(target)
    for start in tqdm(range(0, len(files), BATCH_SIZE), "predict", delay=2, leave=False, disable=None):
        images: dict[Path, Tensor] = {}
        for path in files[start : start + BATCH_SIZE]:
            try:
                images[path] = classifier.preprocess(read_image(path))
            except (FileNotFoundError, ValueError) as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
        if not images:
            continue
        with torch.inference_mode():
            best = model(torch.stack([*images.values()]).to(target)).softmax(-1).topk(top_k)
        for path, indices, values in zip(images, best.indices.tolist(), best.values.tolist(), strict=True):
            yield {"image": str(path), "classes": [names[i] for i in indices], "probabilities": values}


def find_images(paths: Sequence[Path], report: Report = refuse) -> tuple[list[Path], Skipped]:
    """List the images of folders and those below them, in order; any other path is taken for an image.

    Args:
        paths: files and folders.
        report: called with each folder that holds no images or cannot be read; by default that is raised.

    Returns:
        The images, each once, and what is in the folders besides.
    """
    files: dict[Path, None] = {}
    skipped = Skipped()
    for path in paths:
        if not path.is_dir():
            files[path] = None
            continue
        found = sorted(path / os.fsdecode(name) for name in images_under(path, skipped, report))
        if not found:
            report(f"folder {path} holds no images: expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        files |= dict.fromkeys(found)
    return list(files), skipped
