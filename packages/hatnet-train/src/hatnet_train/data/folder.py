"""Image folders in the layout of ImageNet: ``train/`` and ``val/``, in each a folder of images for every class."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from torch import Tensor

from hatnet_train.data.images import SUFFIXES, decode

UNSORTED = (
    "the ILSVRC validation images come unsorted: move each into the folder of its class, as train/ has them "
    "(the classes are in ILSVRC2012_validation_ground_truth.txt of the development kit, and in LOC_val_solution.csv "
    "of the Kaggle download)"
)


class Folder:
    """One split of an image folder: every class folder below ``root``, with all images in and under it.

    Reads nothing but names when made. The names take as many bytes an image as the longest of them has.

    Args:
        root: the folder with the class folders, such as ``imagenet/train``.
        classes: names of the classes, if they are known; else those of the class folders in order.

    Raises:
        FileNotFoundError: if ``root`` is not there.
        ValueError: if it holds no class folders, one without images, two of one name, or one that is not in
            ``classes``.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        self.root = root
        folders = _class_folders(root)
        self.classes = tuple(folders if classes is None else classes)
        unknown = sorted(set(folders) - set(self.classes))
        if unknown:
            if any(re.match("ILSVRC2012_val_", entry.name) for entry in (root / unknown[0]).iterdir()):
                raise ValueError(f"{root / unknown[0]} holds images of all classes; {UNSORTED}")
            raise ValueError(
                f"{root} has class folders that the training data has not: {_some(unknown)}; expected the same names"
            )
        images = [sorted(_images_under(root / name)) for name in folders]
        for name, found in zip(folders, images, strict=True):
            if not found:
                raise ValueError(
                    f"class folder {root / name} holds no images ({', '.join(sorted(SUFFIXES))}); "
                    "expected at least one, or no such folder"
                )
        places = {name: place for place, name in enumerate(self.classes)}
        self.labels = np.repeat([places[name] for name in folders], [len(found) for found in images]).astype(np.int64)
        self._names = np.array([path for found in images for path in found])  # not a list: workers would copy it

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def encoded(self, i: int) -> bytes:
        """The file of image ``i``."""
        return Path(self.name(i)).read_bytes()

    def image(self, i: int) -> Tensor:
        """Image ``i`` decoded, [3, H, W] uint8.

        Raises:
            ValueError: if the file cannot be read or is no image.
        """
        try:
            return decode(self.encoded(i), self.name(i))
        except OSError as error:
            raise ValueError(f"cannot read {self.name(i)}: {error.strerror}") from error

    def name(self, i: int) -> str:
        """Path of image ``i``."""
        return str(self.root / self.classes[self.labels[i]] / os.fsdecode(self._names[i]))

    def digest(self) -> str:
        """Hash of class names, file names and labels; the images themselves are not read."""
        return hashlib.sha256(repr(self.classes).encode() + self._names.tobytes() + self.labels.tobytes()).hexdigest()


def _class_folders(root: Path) -> list[str]:
    """Names of the class folders in order."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}: expected one folder for every class in it")
    with os.scandir(root) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    folders = [name for name, is_folder in found if is_folder]
    loose = [name for name, is_folder in found if not is_folder and Path(name).suffix.lower() in SUFFIXES]
    if loose:
        how_many = f"{len(folders)} class folders and" if folders else "no class folders and"
        raise ValueError(f"{root} holds {how_many} {len(loose)} images beside them, first {loose[0]}; {UNSORTED}")
    if not folders:
        raise ValueError(f"{root} holds no class folders: expected one folder of images for every class")
    same: dict[str, str] = {}
    for name in folders:
        other = same.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), name)
        if other != name:
            raise ValueError(
                f"{root} has two classes of one name: {other!r} and {name!r}; expected one folder a class"
            )
    return folders


def _images_under(folder: Path) -> Iterator[bytes]:
    """Paths of the images below ``folder``, relative to it; links are followed, but not in circles."""
    seen = set()
    for parent, _, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            raise ValueError(f"{parent} is a link to a folder that was read already; expected no circles")
        seen.add((status.st_dev, status.st_ino))
        inner = Path(parent).relative_to(folder)
        for name in names:
            if name[name.rfind(".") :].lower() in SUFFIXES and not name.startswith("."):
                yield os.fsencode(inner / name)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise ValueError(f"cannot read folder {error.filename}: {error.strerror}") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
