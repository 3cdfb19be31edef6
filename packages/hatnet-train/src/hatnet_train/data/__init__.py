"""Labelled images, from files to batches on the device.

``source.py``, ``folder.py`` and ``shards.py`` find and decode images, ``augment.py`` changes them in the workers,
``loader.py`` makes batches of them in the global order, ``mixing.py`` finishes the batches on the device. ``check.py``
looks for what is wrong with them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hatnet_train.data.folder import Folder, Report, Skipped, class_folders, refuse, some
from hatnet_train.data.shards import INDEX, Shards
from hatnet_train.data.source import Digits, Source, Synthetic

logger = logging.getLogger(__name__)

__all__ = ["Source", "log_usage", "open_split"]


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


def log_usage(held_out: Source, training: Source | None = None) -> None:
    """Log how many images are used and what is skipped; warn of classes without held-out images."""
    splits = [split for split in (training, held_out) if split is not None]
    classes = f"of {len(splits[0].classes):,} classes"
    counts = f"{len(held_out):,} held-out images {classes}"
    if training is not None:
        counts = f"{len(training):,} training images {classes}, {len(held_out):,} held out"
    skipped = sum((getattr(split, "skipped", Skipped()) for split in splits), Skipped())
    logger.info("; ".join(filter(None, [counts, str(skipped)])))
    missing = sorted(set(range(len(held_out.classes))) - set(held_out.labels.tolist()))
    if missing:
        logger.warning("no held-out images of %s", some([held_out.classes[place] for place in missing]))
