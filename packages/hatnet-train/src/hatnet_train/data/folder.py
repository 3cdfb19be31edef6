"""Image folders in the layout of ImageNet: ``train/`` and ``val/``, in each a folder of images for every class."""

from __future__ import annotations

import copy
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NoReturn, Self

import numpy as np
from torch import Tensor

from hatnet_core.images import IMAGE_SUFFIXES, is_image_file
from hatnet_train.data.images import decode, read_file

UNSORTED = (
    "the ILSVRC validation images come unsorted: move each into the folder of its class, as train/ has them "
    "(the classes are in ILSVRC2012_validation_ground_truth.txt of the development kit, and in LOC_val_solution.csv "
    "of the Kaggle download)"
)


Report = Callable[[str], object]
"""Called with a problem; raises, or collects and lets the work continue with the rest."""


def refuse(problem: str) -> NoReturn:
    """Raise a problem as ValueError."""
    raise ValueError(problem)


@dataclass
class Skipped:
    """Files and folders that are not read as images."""

    files: int = 0
    folders: int = 0
    """Hidden ones, with all in them."""

    first: str = ""
    """Path of the first."""

    def add(self, path: PurePath, *, folder: bool = False) -> None:
        """Count a file or a hidden folder."""
        self.first = self.first or f"{path}{'/' if folder else ''}"
        self.files += not folder
        self.folders += folder

    def __str__(self) -> str:
        counts = ((self.files, "file"), (self.folders, "hidden folder"))
        shown = " and ".join(f"{n:,} {what}{'s' if n > 1 else ''}" for n, what in counts if n)
        return f"skipped {shown}, first {self.first}" if shown else ""

    def __add__(self, other: Skipped) -> Skipped:
        return Skipped(self.files + other.files, self.folders + other.folders, self.first or other.first)


class Folder:
    """One split of an image folder: every class folder below ``root``, with all images in and under it.

    Reads nothing but names when made. The names take as many bytes an image as the longest of them has. What is an
    image, :func:`hatnet_core.images.is_image_file` decides.

    Args:
        root: the folder with the class folders, such as ``imagenet/train``.
        classes: names of the classes, if they are known; else those of the class folders in order.
        report: called with each problem; by default the first is raised.

    Attributes:
        skipped: what is below ``root`` and not used; paths begin with the name of ``root``.

    Raises:
        FileNotFoundError: if ``root`` is not there.
        ValueError: if it holds no class folders, one without images, two of one name, or one that is not in
            ``classes``.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None, report: Report = refuse) -> None:
        self.root = root
        self.skipped = Skipped()
        folders = class_folders(root, report, self.skipped)
        self.classes = tuple(folders if classes is None else classes)
        unknown = sorted(set(folders) - set(self.classes))
        if unknown:
            if any(re.match("ILSVRC2012_val_", entry.name) for entry in (root / unknown[0]).iterdir()):
                report(f"{root / unknown[0]} holds images of all classes; {UNSORTED}")
            else:
                report(
                    f"{root} has class folders that the training data does not have: {some(unknown)}; "
                    "expected the same names"
                )
            folders = [name for name in folders if name not in unknown]
        images = [images_under(root / name, self.skipped, report, Path(root.name, name)) for name in folders]
        for name, found in zip(folders, images, strict=True):
            if not found:
                report(
                    f"class folder {root / name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                    "expected at least one, or no such folder"
                )
        places = {name: place for place, name in enumerate(self.classes)}
        self.labels = np.repeat([places[name] for name in folders], [len(found) for found in images]).astype(np.int64)
        # not a list, which workers would copy
        self._names = np.array([path for found in images for path in found], dtype=np.bytes_)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def part(self, chosen: np.ndarray) -> Self:
        """Copy with the images of ``chosen``, [N] bool, alone."""
        part = copy.copy(self)
        part.labels, part._names = self.labels[chosen], self._names[chosen]
        return part

    def encoded(self, i: int) -> bytes:
        """Return the file of image ``i``."""
        return read_file(self.name(i))

    def image(self, i: int) -> Tensor:
        """Image ``i`` decoded, [3, H, W] uint8.

        Raises:
            ValueError: if the file cannot be read or is not an image.
        """
        return decode(self.encoded(i), self.name(i))

    def name(self, i: int) -> str:
        """Path of image ``i``."""
        return str(self.root / self.classes[self.labels[i]] / os.fsdecode(self._names[i]))

    def digest(self) -> str:
        """Hash of class names, file names and labels; the images themselves are not read."""
        return hashlib.sha256(repr(self.classes).encode() + self._names.tobytes() + self.labels.tobytes()).hexdigest()


def class_folders(root: Path, report: Report = refuse, skipped: Skipped | None = None) -> list[str]:
    """Names of the class folders in order; hidden ones are none.

    Raises:
        FileNotFoundError: if ``root`` is not there.
        ValueError: by default, if it holds none, images next to them, or two of one name.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root.parent}: {root.name}/ is missing; {_way_out(root.parent, root.name)}")
    with os.scandir(root) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    folders = [name for name, is_folder in found if is_folder and not name.startswith(".")]
    loose = [name for name, is_folder in found if not is_folder and is_image_file(name)]
    for name, is_folder in found:
        if skipped is not None and name not in folders and name not in loose:
            skipped.add(Path(root.name, name), folder=is_folder)
    if loose:
        how_many = f"{len(folders)} class folders and" if folders else "no class folders and"
        report(f"{root} holds {how_many} {len(loose)} images next to them, first {loose[0]}; {UNSORTED}")
    elif not folders:
        report(f"{root} holds no class folders: expected one folder of images for every class")
    same: dict[str, str] = {}
    for name in folders:
        other = same.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), name)
        if other != name:
            report(f"{root} has two classes of one name: {other!r} and {name!r}; expected one folder a class")
    return folders


def _way_out(data: Path, split: str) -> str:
    """Suggest what to do where a split is missing."""
    if split == "val" and (data / "train").is_dir():
        return (
            "move some images of every class from train/ to val/, into folders of the same names, or have "
            "hatnet-train --held-out 0.2 choose them"
        )
    if (data.resolve().parent / split).is_dir():
        return f"did you mean {data.parent}, which contains it?"
    found = sorted(entry.name for entry in data.iterdir())[:5] if data.is_dir() else []
    return (
        "expected train/ and val/ with a folder of images for every class, shards of hatnet-shards, or for "
        "hatnet-train --held-out 0.2 the folders of the classes; "
        f"found {', '.join(found) or 'nothing'}"
    )


def images_under(
    folder: Path, skipped: Skipped, report: Report = refuse, shown: PurePath | None = None
) -> list[bytes]:
    """Paths of the images below a folder, relative to it, in order.

    Links are followed, but not in circles. Hidden folders are not read.

    Args:
        folder: where to look.
        skipped: receives files that are not images.
        report: called with the circles and the folders that cannot be read.
        shown: how the folder is called in ``skipped``; by default by its path.
    """
    shown = folder if shown is None else shown
    found = []
    seen = set()

    def unreadable(error: OSError) -> None:
        report(f"cannot read folder {error.filename}: {error.strerror}")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in seen:
            report(f"{parent} is a link to a folder that was read already; expected no circles")
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner = Path(parent).relative_to(folder)
        for name in sorted(name for name in folders if name.startswith(".")):
            skipped.add(shown / inner / name, folder=True)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if is_image_file(name):
                found.append(os.fsencode(inner / name))
            else:
                skipped.add(shown / inner / name)
    return sorted(found)


def some(names: Sequence[str]) -> str:
    """Join the first five names, and count the others."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
