"""Labelled images, from files to batches on the device.

``source.py``, ``folder.py`` and ``shards.py`` find and decode images, ``augment.py`` changes them in the workers,
``loader.py`` makes batches of them in the global order, ``mixing.py`` finishes the batches on the device. ``check.py``
looks for what is wrong with them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from hatnet_train.data.folder import Folder, Report, Skipped, class_folders, refuse, some
from hatnet_train.data.shards import INDEX, Shards
from hatnet_train.data.source import Digits, Source, Synthetic

__all__ = ["Source", "open_split", "say_what_is_used"]


def open_split(
    data: str, *, train: bool, size: int, classes: Sequence[str] | None = None, report: Report = refuse
) -> Source:
    """Open the training or the held-out images of ``data``.

    Args:
        data: ``digits``, ``synthetic``, or the path of an ImageNet-layout folder or of shards made by
            ``hatnet-shards``.
        train: whether the training images are wanted, or the held-out ones.
        size: side in pixels of synthetic images.
        classes: the classes of the training images, for the held-out ones, which may lack some of them. By default
            those of ``train/`` where it is there, too, as the index of shards has them.
        report: called with what is wrong in a folder; by default it is raised.

    Raises:
        FileNotFoundError: if there is no such folder, or not both splits in it.
        ValueError: if what is in it is not as expected.
        ImportError: if the digits' scikit-learn is not installed.
    """
    if data == "digits":
        return Digits(train=train)
    if data == "synthetic":
        return Synthetic(train=train, size=size)
    root, split = Path(data), "train" if train else "val"
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {data}: expected digits, synthetic, or a folder with train/ and val/")
    if (root / INDEX).is_file():
        return Shards(root, split, classes)
    if classes is None and not train and (root / "train").is_dir():
        classes = class_folders(root / "train", report)
    return Folder(root / split, classes, report)


def say_what_is_used(command: str, held_out: Source, training: Source | None = None) -> None:
    """Write to standard error how many images a command uses and what it skipped; warn of classes without any."""
    splits = [split for split in (training, held_out) if split is not None]
    classes = f"of {len(splits[0].classes):,} classes"
    counts = f"{len(held_out):,} held-out images {classes}"
    if training is not None:
        counts = f"{len(training):,} training images {classes}, {len(held_out):,} held out"
    skipped = sum((getattr(split, "skipped", Skipped()) for split in splits), Skipped())
    sys.stderr.write(f"{command}: {'; '.join(filter(None, [counts, str(skipped)]))}\n")
    missing = sorted(set(range(len(held_out.classes))) - set(held_out.labels.tolist()))
    if missing:
        names = some([held_out.classes[place] for place in missing])
        sys.stderr.write(f"{command}: warning: no held-out images of {names}\n")
