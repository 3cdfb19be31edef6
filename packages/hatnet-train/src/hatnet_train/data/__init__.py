"""Labelled images, from files to batches on the device.

``source.py``, ``folder.py``, ``listing.py`` and ``shards.py`` find and decode images, ``split.py`` holds some of them
out, ``augment.py`` changes them in the workers,
``loader.py`` makes batches of them in the global order, ``mixing.py`` finishes the batches on the device. ``check.py``
looks for what is wrong with them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hatnet_train.data.folder import Folder, Report, Skipped, class_folders, refuse, some
from hatnet_train.data.listing import Listing
from hatnet_train.data.shards import INDEX, Shards
from hatnet_train.data.source import Digits, Source, Synthetic
from hatnet_train.data.split import AS_THE_DATA_IS, HELD_OUT_FOLDERS, Split, held_out_places

logger = logging.getLogger(__name__)

__all__ = ["Source", "Split", "log_usage", "open_split"]


def open_split(
    data: str,
    *,
    train: bool,
    size: int,
    classes: Sequence[str] | None = None,
    report: Report = refuse,
    split: Split = AS_THE_DATA_IS,
) -> Source:
    """Open the training or the held-out images of ``data``.

    Args:
        data: ``digits``, ``synthetic``, or the path of an ImageNet-layout folder, whose held-out images are in
            ``val/``, ``validation/`` or ``test/``, of shards made by ``hatnet-shards``, or with ``split`` of a folder
            of classes, of ``train/`` alone, or of images that a CSV file labels.
        train: whether the training images are wanted, or the held-out ones.
        size: side in pixels of synthetic images.
        classes: the classes of the training images, for the held-out ones, which may lack some of them. By default
            those of ``train/`` where it is there, too, as the index of shards has them.
        report: called with what is wrong in a folder; by default it is raised.
        split: labels, and the share to hold out where the data does not decide.

    Raises:
        FileNotFoundError: if there is no such folder, or not both splits in it.
        ValueError: if what is in it is not as expected.
        ImportError: if the digits' scikit-learn is not installed.
    """
    if split.labels and (data in ("digits", "synthetic") or (Path(data) / INDEX).is_file()):
        raise ValueError(f"labels must be those of a folder of images, got {split.labels} for {data}")
    if data == "digits":
        return Digits(train=train)
    if data == "synthetic":
        return Synthetic(train=train, size=size)
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {data}: expected digits, synthetic, or a folder of images")
    if (root / INDEX).is_file():
        return Shards(root, "train" if train else "val", classes)
    if split.labels:
        listing = Listing(root, Path(split.labels), train=train, classes=classes, report=report)
        return listing if listing.has_split else _part(listing, split, data, train=train)
    training = root / "train"
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if held_out is None and split.held_out:
        whole = Folder(training if training.is_dir() else root, classes, report)
        return _part(whole, split, data, train=train)
    if classes is None and not train and training.is_dir():
        classes = class_folders(training, report)
    return Folder(training if train else held_out or root / "val", classes, report)


def _part(whole: Folder, split: Split, data: str, *, train: bool) -> Folder:
    if not split.held_out:
        raise ValueError(f"held_out must be above 0 for data without held-out images, got {split.held_out} for {data}")
    chosen = held_out_places(whole.labels, len(whole.classes), split, data)
    return whole.part(~chosen if train else chosen)


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
