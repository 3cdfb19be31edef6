"""Check the data of a run without training: every problem at once, and how many images each class has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from hatnet_train.data import Source, Split, open_split
from hatnet_train.data.folder import Folder, Skipped
from hatnet_train.data.loader import load
from hatnet_train.data.shards import Shards, progress_bar
from hatnet_train.data.split import AS_THE_DATA_IS

CHUNK = 64
"""Images that a worker reads at a time."""


@dataclass
class Findings:
    """Result of :func:`check_data`."""

    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Training and held-out images of each class."""

    skipped: Skipped = field(default_factory=Skipped)
    problems: list[str] = field(default_factory=list)


def check_data(data: str, *, size: int, workers: int, split: Split = AS_THE_DATA_IS) -> Findings:
    """Read every image, and compare those to train with and those held out by the SHA-256 of their files.

    Args:
        data: as for :func:`hatnet_train.data.open_split`.
        size: side in pixels of synthetic images.
        workers: processes that read; 0 for this one alone.
        split: as for :func:`hatnet_train.data.open_split`.
    """
    found = Findings()
    training = _opened(data, found, train=True, size=size, split=split)
    classes = training.classes if training else None
    held_out = _opened(data, found, train=False, size=size, split=split, classes=classes)
    if training and len(training.classes) < 2:
        found.problems.append(f"{data} must have at least two classes, got 1 ({training.classes[0]})")
    counts = [_counts(source) for source in (training, held_out)]
    found.counts = {
        name: (counts[0].get(name, 0), counts[1].get(name, 0)) for name in sorted({*counts[0], *counts[1]})
    }
    known: dict[bytes, int] = {}
    with progress_bar(sum(len(source) for source in (training, held_out) if source), "check", "image") as bar:
        for source in (training, held_out):
            for i, digest, problem in _read(source, workers):
                bar.update()
                if problem:
                    found.problems.append(problem)
                elif training and source is training:
                    first = known.setdefault(digest, i)
                    if training.labels[first] != training.labels[i]:
                        found.problems.append(f"{training.name(i)}: same picture as {training.name(first)}")
                elif training and digest in known:
                    twin = training.name(known[digest])
                    found.problems.append(f"{held_out.name(i) if held_out else i}: same picture as {twin}")
    found.problems = list(dict.fromkeys(found.problems))  # what is wrong with both splits was found twice
    return found


def _counts(source: Source | None) -> dict[str, int]:
    if source is None:
        return {}
    return dict(zip(source.classes, np.bincount(source.labels, minlength=len(source.classes)).tolist(), strict=True))


def _opened(
    data: str, found: Findings, *, train: bool, size: int, split: Split, classes: tuple[str, ...] | None = None
) -> Source | None:
    """Open as much of a split as can be used; None if that is nothing."""
    try:
        source = open_split(data, train=train, size=size, classes=classes, report=found.problems.append, split=split)
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
        return None
    found.skipped += getattr(source, "skipped", Skipped())
    return source if len(source) else None


def _read(source: Source | None, workers: int) -> Iterator[tuple[int, bytes, str]]:
    """Yield number, hash and problem of every image; nothing for images without files."""
    if isinstance(source, Folder | Shards):
        for chunk in load(
            _Reader(source), iter(np.split(np.arange(len(source)), range(CHUNK, len(source), CHUNK))), workers
        ):
            yield from chunk


class _Reader:
    """Reads images in a worker."""

    def __init__(self, source: Folder | Shards) -> None:
        self.source = source

    def __call__(self, numbers: np.ndarray) -> list[tuple[int, bytes, str]]:
        return [(i, *self._read(i)) for i in numbers.tolist()]

    def _read(self, i: int) -> tuple[bytes, str]:
        try:
            self.source.image(i)
            return hashlib.sha256(self.source.encoded(i)).digest(), ""
        except ValueError as error:
            return b"", str(error)
