"""Predictions of held-out images: gathered from all ranks, and counted class by class.

:class:`Predictions` records while a rank evaluates, and :class:`Results` is what all ranks have recorded.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hatnet_core.io import atomic_write
from hatnet_train.data.order import evaluation_share

CONFUSED = 3
"""Other classes that a row of the CSV file names."""


@dataclass(frozen=True)
class Results:
    """The prediction of every held-out image that could be read, each once, in the order of the data set.

    Attributes:
        classes: names of the classes.
        images: [N] places in the data set.
        labels: [N] places in ``classes``.
        predictions: [N] places in ``classes``.
        probabilities: [N] of the predictions, from 0 to 1.
    """

    classes: tuple[str, ...]
    images: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """[N] bool."""
        return self.labels == self.predictions

    def confusions(self) -> list[tuple[int, int, int]]:
        """Label, prediction and number of images of every pair that occurs."""
        pairs, counts = np.unique(self.labels * len(self.classes) + self.predictions, return_counts=True)
        return [(*divmod(pair, len(self.classes)), n) for pair, n in zip(pairs.tolist(), counts.tolist(), strict=True)]

    def per_class(self) -> list[dict[str, Any]]:
        """Count the images of each class in order.

        Returns:
            ``class``, ``images``, ``correct``, ``top1`` (percent, None without images), ``predicted`` (images taken
            for this class) and ``confused_with`` (other classes that its images are taken for, most frequent first).
        """
        images, correct, predicted = (
            np.bincount(values, minlength=len(self.classes)).tolist()
            for values in (self.labels, self.labels[self.correct], self.predictions)
        )
        others: dict[int, list[tuple[int, str]]] = {}
        for label, prediction, number in self.confusions():
            if label != prediction:
                others.setdefault(label, []).append((number, self.classes[prediction]))
        return [
            {
                "class": name,
                "images": images[i],
                "correct": correct[i],
                "top1": 100 * correct[i] / images[i] if images[i] else None,
                "predicted": predicted[i],
                "confused_with": {name: number for number, name in sorted(others.get(i, ()), key=_frequent)},
            }
            for i, name in enumerate(self.classes)
        ]

    def confident_mistakes(self, number: int) -> list[int]:
        """Rows of the wrong predictions with the highest probabilities, highest first."""
        return self._first(~self.correct, -self.probabilities, number)

    def unsure_hits(self, number: int) -> list[int]:
        """Rows of the right predictions with the lowest probabilities, lowest first."""
        return self._first(self.correct, self.probabilities, number)

    def _first(self, chosen: np.ndarray, key: np.ndarray, number: int) -> list[int]:
        rows = np.flatnonzero(chosen)
        return rows[np.argsort(key[rows], kind="stable")][:number].tolist()


def _frequent(pair: tuple[int, str]) -> int:
    return -pair[0]


class Predictions:
    """Record the predictions of one model for this rank's held-out images.

    Args:
        length: number of held-out images of all ranks.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._rows: list[Tensor] = []

    def add(self, labels: Tensor, predictions: Tensor, logits: Tensor) -> None:
        """Record a batch of :func:`hatnet_train.data.loader.evaluation_batches`; batches come in their order.

        Args:
            labels: [B], -1 for images that are not counted.
            predictions: [B] classes.
            logits: [B, K] float32.
        """
        chosen = logits.softmax(-1).gather(1, predictions[:, None])[:, 0]
        self._rows.append(torch.stack([labels >= 0, predictions, chosen], -1).double())  # remains on the device

    def gather(self, labels: np.ndarray, classes: Sequence[str]) -> Results:
        """Return what all ranks recorded; all ranks have to call it.

        Args:
            labels: [N] of all held-out images.
            classes: their names.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mine = torch.cat(self._rows)
        own = torch.from_numpy(evaluation_share(self._length, rank=rank, world_size=world_size)).to(mine.device)
        whole = mine.new_zeros(self._length, mine.shape[1])
        whole[own] = mine[: len(own)]  # the batches are padded at their end
        dist.all_reduce(whole)  # exact: all other ranks add 0
        counted, predictions, probabilities = whole.cpu().numpy().T
        images = np.flatnonzero(counted)
        return Results(
            tuple(classes),
            images,
            labels[images],
            predictions[images].astype(np.int64),
            probabilities[images],
        )


def write_per_class(results: Results, path: Path) -> None:
    """Write the counts of every class to a CSV file, and the classes that it is most often taken for."""
    columns = ["class", "images", "correct", "top1", "predicted", "confused_with"]
    with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in results.per_class():
            top1 = "" if row["top1"] is None else f"{row['top1']:.2f}"
            confused = "; ".join(f"{name} {number}" for name, number in [*row["confused_with"].items()][:CONFUSED])
            writer.writerow({**row, "top1": top1, "confused_with": confused})
