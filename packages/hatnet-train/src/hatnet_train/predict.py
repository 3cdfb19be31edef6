"""Classify image files with a trained checkpoint."""

from __future__ import annotations

import glob
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hatnet_core.devices import pick_device
from hatnet_core.images import IMAGE_SUFFIXES, is_image_file
from hatnet_train.classifier import Classifier
from hatnet_train.data.folder import Report, Skipped, images_under, refuse
from hatnet_train.data.images import read_image
from hatnet_train.deepspeed.user_json import AUTOCAST_DTYPES
from hatnet_train.precision import fast_precision

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
    files: Iterable[Path],
    top_k: int = 1,
    device: str = "auto",
    on_bad: Callable[[str], object] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    precision: str = "fp32",
) -> Iterator[dict[str, Any]]:
    """Yield the results of :func:`predict` batch by batch.

    Args:
        classifier: of :func:`hatnet_train.classifier.load_classifier`.
        files: image files; an iterator is read batch by batch.
        top_k: how many classes to return an image, best first.
        device: as for :func:`hatnet_core.devices.pick_device`.
        on_bad: called with the reason for each image that cannot be read and is skipped; by default that is raised.
        batch_size: images to compute at a time.
        precision: bf16 or fp16 through autocast, fp32, or auto for bf16 where the device has it.

    Raises:
        FileNotFoundError: by default, if an image is not there.
        ValueError: as :func:`predict` does.
    """
    names = classifier.classes
    if not 1 <= top_k <= len(names):
        raise ValueError(f"top_k must be from 1 to the {len(names)} classes, got {top_k}")
    target = pick_device(device)
    model = classifier.model.to(target)
    name = fast_precision(target)[0] if precision == "auto" else precision
    dtype = AUTOCAST_DTYPES.get(name)
    autocast = torch.autocast(target.type, getattr(torch, dtype or "bfloat16"), enabled=dtype is not None)
    total = len(files) if isinstance(files, Collection) else None
    remaining = iter(files)
    with tqdm(total=total, desc="predict", unit="image", delay=2, leave=False, disable=None) as bar:
        while batch := list(itertools.islice(remaining, batch_size)):
            images = _read(classifier, batch, on_bad)
            if images:
                with torch.inference_mode(), autocast:
                    logits = model(torch.stack([image for _, image in images]).to(target))
                best = logits.float().softmax(-1).topk(top_k)
                results = zip(images, best.indices.tolist(), best.values.tolist(), strict=True)
                for (path, _), indices, values in results:
                    yield {"image": str(path), "classes": [names[i] for i in indices], "probabilities": values}
            bar.update(len(batch))


def _read(
    classifier: Classifier, files: Sequence[Path], on_bad: Callable[[str], object] | None
) -> list[tuple[Path, Tensor]]:
    """Read images as inputs of the model; those that cannot be read are reported."""
    images = []
    for path in files:
        try:
            images.append((path, classifier.preprocess(read_image(path))))
        except (FileNotFoundError, ValueError) as error:
            if on_bad is None:
                raise
            on_bad(str(error))
    return images


def find_images(paths: Sequence[Path], report: Report = refuse) -> tuple[list[Path], Skipped]:
    """List the images of folders and those below them, and of patterns; any other path is taken for an image.

    Args:
        paths: files, folders, and patterns of Python's :mod:`glob` such as ``scans/**/*.png``.
        report: called with each folder or pattern without images, or that cannot be read; by default that is raised.

    Returns:
        The images, each once, and what is in the folders besides.
    """
    files: dict[Path, None] = {}
    skipped = Skipped()
    for path in itertools.chain.from_iterable(_matches(path, skipped, report) for path in paths):
        if not path.is_dir():
            files[path] = None
            continue
        found = sorted(path / os.fsdecode(name) for name in images_under(path, skipped, report))
        if not found:
            report(f"folder {path} holds no images: expected files that end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        files |= dict.fromkeys(found)
    return list(files), skipped


def _matches(path: Path, skipped: Skipped, report: Report) -> Iterator[Path]:
    """Yield the folders and images that match a pattern, or ``path`` itself if it is none."""
    if path.exists() or not glob.has_magic(str(path)):
        yield path
        return
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207  also absolute ones
    if not matches:
        report(f"{path}: must match image files or folders, got none")
    for match in matches:
        if match.is_dir() or is_image_file(match.name):
            yield match
        else:
            skipped.add(match)
