"""Labelled images, from files to batches on the device.

``source.py``, ``folder.py`` and ``shards.py`` find and decode images, ``augment.py`` changes them in the workers,
``loader.py`` makes batches of them in the global order, ``mixing.py`` finishes the batches on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hatnet_train.data.folder import Folder
from hatnet_train.data.shards import INDEX, Shards
from hatnet_train.data.source import Digits, Source, Synthetic

__all__ = ["Source", "open_split"]


def open_split(data: str, *, train: bool, size: int, classes: Sequence[str] | None = None) -> Source:
    """The training or the held-out images of ``data``.

    Args:
        data: ``digits``, ``synthetic``, or the path of an ImageNet-layout folder or of shards made by
            ``hatnet-shards``.
        train: whether the training images are wanted, or the held-out ones.
        size: side in pixels of synthetic images.
        classes: the classes of the training images, for the held-out ones of a folder.

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
    if not (root / split).is_dir():
        found = sorted(entry.name for entry in root.iterdir())[:5]
        raise FileNotFoundError(
            f"data folder {root} has no {split}/: expected train/ and val/ with one folder for every class, or the "
            f"{INDEX} of hatnet-shards; found {', '.join(found) or 'nothing'}"
        )
    return Folder(root / split, classes)
