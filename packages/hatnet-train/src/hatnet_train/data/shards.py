"""Images in WebDataset tar shards, read in any order.

The folder that :func:`hatnet_train.data.shard_writer.write_shards` makes holds

- ``train-000000.tar`` and so on: plain tar files, for every image ``<key>.jpg`` (or whatever format it has) and then
  ``<key>.cls`` with the label as text, which the webdataset library reads as well;
- ``train.index.npy``: a record (:data:`RECORD`) for every image, which says where its bytes are;
- ``index.json``: the classes, and for every split its shards with their sizes and hashes (:class:`Index`).

The records are mapped into memory, not read: all processes of a machine share the 26 MB of ImageNet's.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import reprlib
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TextIO

import numpy as np
from msgspec import Meta
from torch import Tensor
from tqdm import tqdm

from hatnet_train.data.images import decode, unreadable
from hatnet_train.records import Count, Sha256, read_json

INDEX = "index.json"
"""Name of the file that makes a folder one of shards."""

FORMAT, VERSION = "hatnet-shards", 1

RECORD = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4")])
"""Where an image is: number of its shard, first byte and number of bytes of the image file in it; and its label."""

OPEN_SHARDS = 256
"""Most shards that one process has open for a split: with both splits half of the 1,024 files that Linux allows."""

_SPLIT = r"^[A-Za-z0-9_-]+\Z"
_CHUNK = 1 << 16
"""Records that are checked at a time, so that the check takes little memory."""


@dataclass(frozen=True)
class Shard:
    """A tar file: its name, bytes, SHA-256 in hexadecimal digits, and number of images."""

    file: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]+\.tar\Z")]
    bytes: Count
    sha256: Sha256
    images: Count


@dataclass(frozen=True)
class Split:
    """The shards of a split in order, its number of images, and the SHA-256 of its records file."""

    images: Count
    records_sha256: Sha256
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        """Refuse another number of images than that of the shards."""
        images = sum(shard.images for shard in self.shards)
        if images != self.images or not images:
            raise ValueError(f"images must be the {images} of its shards, and at least 1, got {self.images}")


@dataclass(frozen=True)
class Index:
    """Content of ``index.json``, without format and version.

    Attributes:
        classes: names of the classes of all splits, in the order of the labels.
        made: ``resize`` (pixels of the short side, or null if the files are unchanged), ``quality`` (of the JPEG
            files that were made, or null if none) and ``seed`` (of the order of the training images).
        splits: by name.
    """

    classes: Annotated[tuple[str, ...], Meta(min_length=1)]
    made: dict[str, int | None]
    splits: dict[Annotated[str, Meta(pattern=_SPLIT)], Split]

    def __post_init__(self) -> None:
        """Refuse equal names of classes."""
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be unique, got {reprlib.repr(list(self.classes))}")


class Shards:
    """One split of a folder of shards.

    Opening it reads the index and asks for the sizes of the shards; it reads no shard. Threads and forked processes
    may read from one object: no read moves a position that they share.

    Args:
        root: folder with ``index.json``.
        split: ``train`` or ``val``.
        classes: names of the classes, if they are known; else those of the index.

    Attributes:
        classes: names of the classes.
        labels: [N] int64, places in ``classes``.

    Raises:
        FileNotFoundError: if the index, the split or one of its files is not there.
        ValueError: if the index is damaged, does not fit the shards, or has a class that is not in ``classes``.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str] | None = None) -> None:
        index = read_index(root)
        if split not in index.splits:
            raise FileNotFoundError(f"{root} has no split {split}: expected train or val, found {_some(index.splits)}")
        self.root = root
        self.split = split
        self.classes = index.classes if classes is None else tuple(classes)
        self._places = _places(root, index.classes, self.classes)
        self._index = index.splits[split]
        for shard in self._index.shards:
            _check_size(root / shard.file, shard.bytes)
        self._attach()

    def __len__(self) -> int:
        """Return the number of images."""
        return self._index.images

    def encoded(self, i: int) -> bytes:
        """Return the bytes of image file ``i``.

        Raises:
            ValueError: if its shard cannot be read.
        """
        shard, offset, size, _ = self._records[i].item()
        path = self._paths[shard]
        found = self._read(path, size, offset)
        if len(found) != size:
            raise ValueError(
                f"cannot read image {i} from {path}: found {len(found)} bytes at {offset}, expected {size}"
            )
        return found

    def image(self, i: int) -> Tensor:
        """Image ``i`` decoded, [3, H, W] uint8.

        Raises:
            ValueError: if its shard cannot be read or it is damaged.
        """
        encoded = self.encoded(i)
        try:
            return decode(encoded, "")
        except ValueError:
            return decode(encoded, self.name(i))  # fails alike: only now is the name worth reading

    def name(self, i: int) -> str:
        """Path of the shard of image ``i`` and, if it can be read, the name of the image in it."""
        shard, offset, _, _ = self._records[i].item()
        try:
            header = self._read(self._paths[shard], tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
            return f"{self._paths[shard]}: {tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"
        except (ValueError, tarfile.HeaderError):
            return f"{self._paths[shard]}: image at byte {offset}"

    def digest(self) -> str:
        """Hash of class names, hashes of the shards as the index has them, and labels; no shard is read."""
        hashes = "".join(shard.sha256 for shard in self._index.shards)
        return hashlib.sha256(repr(self.classes).encode() + hashes.encode() + self.labels.tobytes()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        """Without what another process opens for itself."""
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_records", "labels")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._attach()

    def _attach(self) -> None:
        """Map the records into memory."""
        path = records_path(self.root, self.split)
        self._records = _map_records(path, self._index.images)
        _check_records(self._records, path, self._index.shards, len(self._places))
        self.labels = self._places[self._records["label"]]
        self._paths = [str(self.root / shard.file) for shard in self._index.shards]
        self._open = lru_cache(OPEN_SHARDS)(_OpenFile)

    def _read(self, path: str, size: int, offset: int) -> bytes:
        try:
            file = self._open(path)  # held while it is read, lest another thread's reading closes it
            return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise unreadable(path, error) from error


class _OpenFile(io.FileIO):
    """A file open for reading, closed when no longer referenced by the cache or a thread that reads from it."""

    def __del__(self) -> None:
        self.close()


def verify(root: Path, *, progress: bool = True) -> None:
    """Read all shards and compare them with the hashes in the index.

    Args:
        root: folder with ``index.json``.
        progress: whether to show it.

    Raises:
        FileNotFoundError: as :class:`Shards` does.
        ValueError: naming the first file that is damaged, or as :class:`Shards` does.
    """
    index = read_index(root)
    expected = {}
    for name, split in index.splits.items():
        Shards(root, name)
        expected[records_path(root, name)] = split.records_sha256
        expected.update({root / shard.file: shard.sha256 for shard in split.shards})
    with progress_bar(sum(path.stat().st_size for path in expected), "verify", "B", disable=not progress) as bar:
        for path, sha256 in expected.items():
            found = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    found.update(block)
                    bar.update(len(block))
            if found.hexdigest() != sha256:
                raise ValueError(f"{path} is damaged: its SHA-256 is {found.hexdigest()}, expected {sha256}")


def progress_bar(total: int, what: str, unit: str, *, disable: bool = False) -> tqdm[NoReturn]:
    """Show a bar on a terminal; in a log file a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        disable=disable,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.2 if terminal else 30,
        delay=2,
    )


class _Lines:
    """A file in which every state of a bar is a line of its own, where on a terminal one overwrites the other."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def write(self, text: str) -> None:
        if line := text.strip():
            self.file.write(f"{line}\n")

    def flush(self) -> None:
        self.file.flush()


def records_path(root: Path, split: str) -> Path:
    """Return the file with the records of a split."""
    return root / f"{split}.index.npy"


def check_split_name(split: str) -> None:
    """Raise ValueError unless ``split`` can be a part of file names."""
    if not re.match(_SPLIT, split):
        raise ValueError(f"split must be a name of letters, digits, - and _, such as train, got {split!r}")


def read_index(root: Path) -> Index:
    """Read ``index.json`` and check its form.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: naming file, value and expectation, if something in it is not as it must be.
    """
    path = root / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected the index of a folder that hatnet-shards made")
    return read_json(path, Index, {"format": FORMAT, "version": VERSION})


def _places(root: Path, own: tuple[str, ...], classes: tuple[str, ...]) -> np.ndarray:
    """For the labels of the index, those in ``classes``."""
    unknown = sorted(set(own) - set(classes))
    if unknown:
        raise ValueError(
            f"{root} has classes that the training data has not: {_some(unknown)}; expected the same names"
        )
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places[name] for name in own], dtype=np.int64)


def _check_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no shard {path}: expected a file of {expected} bytes") from error
    if found != expected:
        raise ValueError(f"shard {path} has {found} bytes, expected {expected}: copy it again")


def _map_records(path: Path, images: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected the records of {images} images")
    try:
        records = np.lib.format.open_memmap(path, mode="r")  # as np.load would, but takes no pickles or archives
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): expected an array of {images} records") from error
    if (records.dtype, records.shape) != (RECORD, (images,)):
        found = f"{records.dtype} and shape {records.shape}"
        raise ValueError(f"{path} has records of {found}, expected {RECORD} and {(images,)}")
    return np.asarray(records)  # a plain view of the map is several times as fast to index


def _check_records(records: np.ndarray, path: Path, shards: Sequence[Shard], classes: int) -> None:
    """Raise ValueError with the first record that is not the place of an image in a shard."""
    ends = np.array([shard.bytes for shard in shards], dtype=np.uint64)
    counts = np.zeros(len(shards), dtype=np.int64)
    for first in range(0, len(records), _CHUNK):
        part = records[first : first + _CHUNK]
        shard = np.minimum(part["shard"], len(shards) - 1)
        end, size, offset = ends[shard], part["size"].astype(np.uint64), part["offset"]
        inside = (offset >= tarfile.BLOCKSIZE) & (size > 0) & (size <= end - np.minimum(offset, end))
        wrong = ~inside | (part["shard"] != shard) | (part["label"] >= classes)
        if wrong.any():
            i = int(wrong.argmax())
            limits = f"{len(shards)} shards, {end[i]} bytes in it and {classes} classes"
            raise ValueError(f"{path}: record {first + i} is {_described(part[i])}, expected a place in {limits}")
        counts += np.bincount(shard, minlength=len(shards))
    for shard_entry, count in zip(shards, counts, strict=True):
        if count != shard_entry.images:
            raise ValueError(f"{path} has {count} images in {shard_entry.file}, expected {shard_entry.images}")


def _described(record: np.void) -> str:
    return ", ".join(f"{name} {record[name]}" for name in RECORD.names or ())


def _some(names: Sequence[str] | dict[str, Any]) -> str:
    return ", ".join(list(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
