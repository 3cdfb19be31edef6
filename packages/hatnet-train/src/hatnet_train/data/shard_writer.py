"""From an image folder in ImageNet's layout to the tar shards that :mod:`hatnet_train.data.shards` reads.

The same images and arguments give the same bytes, on any number of processes. Nothing half-written is ever at
``out``: all is written in a folder ``<out>.tmp-…`` next to it, which takes its name at the end and is removed if the
work fails. Only a run that is killed outright leaves such a folder behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import tarfile
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from hatnet_core.io import sync_folder
from hatnet_train.config import QUALITY, SHARD_MEGABYTES
from hatnet_train.data.folder import Folder, Skipped, refuse
from hatnet_train.data.images import decode, read_file, to_pillow
from hatnet_train.data.shards import (
    FORMAT,
    INDEX,
    RECORD,
    VERSION,
    Index,
    Shard,
    Split,
    check_split_name,
    progress_bar,
    records_path,
)
from hatnet_train.workers import WorkerError, kill

logger = logging.getLogger(__name__)

_SAMPLE = 64
"""Images that are measured to find out how many make a shard."""

_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
"""By Pillow's name of the format; of the others it is the name itself. MPO is what telephones make: JPEG and more."""

_JPEG_END = b"\xff\xd9"


def write_shards(
    data: Path,
    out: Path,
    *,
    splits: Sequence[str] = ("train", "val"),
    shard_megabytes: float = SHARD_MEGABYTES,
    resize: int | None = None,
    quality: int = QUALITY,
    seed: int = 0,
    workers: int = 0,
    on_bad: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Write the images of a folder as shards, and show progress.

    The training images come in an order that ``seed`` decides, for readers in sequence; those of the other splits in
    the order of their names.

    Args:
        data: folder with ``train/`` and ``val/``, in each a folder of images for every class.
        out: folder for the shards, new or empty.
        splits: names of the splits to write. The first decides on the classes.
        shard_megabytes: about the size of a shard, in 10⁶ bytes.
        resize: pixels of the short side that larger images are made smaller to, with all images that are not JPEG
            becoming JPEG; else all files stay as they are, byte for byte. Then those that begin and end as a JPEG
            file should are not decoded to see whether they are whole.
        quality: of the JPEG files that resizing makes, 1 to 100.
        seed: of the order of the training images.
        workers: processes that write at the same time; 0 for this one alone.
        on_bad: called with the reason for each image that cannot be read and is skipped; by default that is raised.

    Returns:
        What ``index.json`` holds.

    Raises:
        FileNotFoundError: if ``data`` is not there or has not all splits.
        ValueError: if an argument is out of range, ``out`` is taken, or an image, or every image of a split, cannot be
            read.
        OSError: if writing fails, such as for want of space, or a process that wrote was killed.
    """
    _check_arguments(splits, shard_megabytes, resize, quality, seed, workers)
    out = _free_place(out)
    folders: dict[str, Folder] = {}
    for split in splits:
        folders[split] = Folder(data / split, folders[splits[0]].classes if folders else None)
    if skipped := str(sum((folder.skipped for folder in folders.values()), Skipped())):
        logger.info(skipped)
    staging = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    staging.mkdir(parents=True)
    try:
        jobs = _jobs(folders, staging, shard_megabytes * 1e6, Conversion(resize, quality), seed, on_bad is None)
        with progress_bar(sum(map(len, folders.values())), "shards", "image") as bar:
            written = _write_all(jobs, workers, bar, on_bad or refuse)
        made = {"resize": resize, "quality": None if resize is None else quality, "seed": seed}
        index = _write_index(staging, Index(folders[splits[0]].classes, made, _write_records(staging, written)))
        sync_folder(staging)
        staging.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return index


@dataclass(frozen=True)
class Conversion:
    """Conversion of an image file for a shard; ``resize`` and ``quality`` are those of :func:`write_shards`."""

    resize: int | None
    quality: int

    def __call__(self, encoded: bytes, name: str) -> tuple[bytes, str]:
        """Return the bytes to store and their ending.

        Args:
            encoded: an image file.
            name: its path, for the error message.

        Raises:
            ValueError: if it is not a valid image; only the parts that are read are checked.
        """
        ending = _ending(encoded, name)
        if self.resize is None:
            if ending != "jpg" or not encoded.rstrip(b"\0").endswith(_JPEG_END):
                decode(encoded, name)  # odd, perhaps cut off: better found now than by a training run
            return encoded, ending
        image = decode(encoded, name)
        height, width = image.shape[-2:]
        short = min(height, width)
        if short > self.resize:
            size = [round(side * self.resize / short) for side in (height, width)]
            image = F.resize(image, size, InterpolationMode.BICUBIC, antialias=True)
        elif ending == "jpg":
            return encoded, ending
        buffer = io.BytesIO()
        to_pillow(image).save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
        return buffer.getvalue(), "jpg"


def _ending(encoded: bytes, name: str) -> str:
    """Return the usual ending of an image file's real format, whatever its name says; reads the header alone."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return _ENDINGS.get(str(image.format), str(image.format).lower())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        decode(encoded, name)  # says what is wrong with it, if torchvision cannot read it either
        return "jpg"


@dataclass(frozen=True)
class _Job:
    """A shard to write: its split, file, and for every image path, key and label."""

    split: str
    file: Path
    images: list[tuple[str, str, int]]
    conversion: Conversion
    strict: bool
    """Fail at an image that cannot be read."""


@dataclass(frozen=True)
class _Written:
    """A shard that is written, with the records of its images; their ``shard`` is still 0."""

    split: str
    shard: Shard
    records: np.ndarray
    bad: tuple[str, ...]
    """Reasons of the images that were skipped."""


def _jobs(
    folders: dict[str, Folder], staging: Path, shard_bytes: float, conversion: Conversion, seed: int, strict: bool
) -> Iterator[_Job]:
    """Plan the shards of all splits; those of a split have the same number of images, but for one."""
    for split, folder in folders.items():
        order = np.arange(len(folder))
        if split == "train":
            order = np.random.default_rng(seed).permutation(len(folder))
        keys = _keys(folder)
        fitting = max(1, int(shard_bytes / _mean_bytes(folder, order, conversion)))
        for number, part in enumerate(np.array_split(order, -(-len(order) // fitting))):
            images = [(folder.name(i), keys[i], int(folder.labels[i])) for i in part]
            yield _Job(split, staging / f"{split}-{number:06d}.tar", images, conversion, strict)


def _mean_bytes(folder: Folder, order: np.ndarray, conversion: Conversion) -> float:
    """Bytes that an image takes in a shard, measured on a sample."""
    sample = order[np.linspace(0, len(order) - 1, min(_SAMPLE, len(order))).astype(int)]
    sizes = [0]
    for i in sample:
        with contextlib.suppress(ValueError):  # the job meets the image again, and reports it
            sizes.append(len(conversion(folder.encoded(i), folder.name(i))[0]))
    headers_and_label = 3 * tarfile.BLOCKSIZE
    return sum(sizes) / max(1, len(sizes) - 1) + headers_and_label + tarfile.BLOCKSIZE / 2


def _keys(folder: Folder) -> list[str]:
    """For every image ``<class>/<path in its folder without ending>``, all different, of plain characters."""
    classes = _unique(_plain(name, 100) for name in folder.classes)
    keys = []
    for label, images in itertools.groupby(range(len(folder)), folder.labels.__getitem__):
        above = len(str(folder.root / folder.classes[label])) + 1
        stems = (_plain(folder.name(i)[above:].rpartition(".")[0], 80) for i in images)
        keys += [f"{classes[label]}/{stem}" for stem in _unique(stems)]
    return keys


def _plain(name: str, most: int) -> str:
    """``name`` with ``_`` for all but letters, digits, ``-`` and ``_``, in at most ``most`` bytes.

    The webdataset library takes the first dot of a file name for the beginning of its ending, and skips folders whose
    names begin with ``__``. Names of at most 100 bytes fit the header of a tar file.
    """
    plain = re.sub(r"[^\w-]", "_", unicodedata.normalize("NFC", name)).strip("_")
    return plain.encode()[:most].decode(errors="ignore") or "unnamed"


def _unique(names: Iterable[str]) -> list[str]:
    """Return the names, with -2, -3 and so on at the end of those that came before."""
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    unique = []
    for name in names:
        candidate = name
        while candidate in taken:
            repeats[name] += 1
            candidate = f"{name}-{repeats[name] + 1}"
        taken.add(candidate)
        unique.append(candidate)
    return unique


def _write_all(
    jobs: Iterator[_Job], workers: int, bar: tqdm[NoReturn], on_bad: Callable[[str], object]
) -> list[_Written]:
    """Write the shards, in this process or on ``workers`` others; results are in the order of the jobs."""
    written: list[_Written] = []

    def done(result: _Written) -> None:
        written.append(result)
        bar.update(len(result.records) + len(result.bad))
        for problem in result.bad:
            on_bad(problem)

    if not workers:
        for job in jobs:
            done(_write_shard(job))
        return written
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy locks that torch's threads may hold
    context.set_forkserver_preload([__name__])  # torch is imported once, and its memory shared
    try:  # this makes semaphores, and so starts Python's tracker of them, which would unblock SIGINT later
        pool = ProcessPoolExecutor(workers, context, _start_worker)
    except OSError as error:
        raise WorkerError(f"cannot start data workers: {error}") from error
    waiting: deque[Future[_Written]] = deque()
    try:
        for job in jobs:
            if len(waiting) == 2 * workers:  # the lists of more would only take memory
                done(waiting.popleft().result())
            with _interrupts_held():
                waiting.append(pool.submit(_write_shard, job))
        while waiting:
            done(waiting.popleft().result())
    except BrokenProcessPool as error:
        raise ChildProcessError(f"a worker was killed (out of memory?); use fewer than {workers} workers") from error
    except BaseException:
        kill(set(multiprocessing.active_children()) - others)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return written


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while processes are started; they inherit that it is blocked.

    Else the fork server would show where it was in its imports, and a worker that starts when its parent has just gone
    what it misses. Blocking alone holds nothing back here: one of the libraries' threads would take the signal.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if held:
        signal.raise_signal(signal.SIGINT)


def _start_worker() -> None:
    """Prepare a worker: the parent alone answers Ctrl-C, and no worker outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> NoReturn:
    """End this process when the one of ``sentinel`` has ended; a pool would wait for work for ever."""
    wait([sentinel])
    os._exit(1)


def _write_shard(job: _Job) -> _Written:
    """Write one shard.

    Raises:
        ValueError: naming the first image that cannot be read.
        OSError: naming the shard, if it cannot be written.
    """
    records: list[tuple[int, int, int, int]] = []
    bad = []
    with (
        _durable(job.file) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar,
    ):
        for path, key, label in job.images:
            try:
                content, ending = job.conversion(read_file(path), path)
            except ValueError as error:
                if job.strict:
                    raise
                bad.append(str(error))
                continue
            records.append((0, file.tell() + tarfile.BLOCKSIZE, len(content), label))
            _add(tar, f"{key}.{ending}", content)
            _add(tar, f"{key}.cls", str(label).encode())
    with job.file.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    shard = Shard(job.file.name, job.file.stat().st_size, sha256, len(records))
    return _Written(job.split, shard, np.array(records, RECORD), tuple(bad))


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file with nothing in its header that tells one run from another."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(content))


def _write_records(staging: Path, written: Sequence[_Written]) -> dict[str, Split]:
    """Write the records of every split; what the index says of the splits."""
    splits = {}
    for split in dict.fromkeys(part.split for part in written):
        parts = [part for part in written if part.split == split]
        records = np.concatenate([part.records for part in parts])
        if not len(records):
            raise ValueError(f"none of the {split} images can be read; expected at least one")
        records["shard"] = np.repeat(np.arange(len(parts)), [len(part.records) for part in parts])
        buffer = io.BytesIO()
        np.save(buffer, records, allow_pickle=False)
        with _durable(records_path(staging, split)) as file:
            file.write(buffer.getbuffer())
        sha256 = hashlib.sha256(buffer.getbuffer()).hexdigest()
        splits[split] = Split(len(records), sha256, tuple(part.shard for part in parts))
    return splits


def _write_index(staging: Path, index: Index) -> dict[str, Any]:
    content = {"format": FORMAT, "version": VERSION, **asdict(index)}
    encoded = json.dumps(content, indent=1).encode()
    with _durable(staging / INDEX) as file:
        file.write(encoded)
    return json.loads(encoded)


@contextmanager
def _durable(path: Path) -> Iterator[BinaryIO]:
    """Open a new file and flush it to the disk at the end; an OSError names it."""
    try:
        with path.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


def _free_place(out: Path) -> Path:
    """``out`` without symbolic links, if nothing is there but an empty folder, whose place another can take."""
    out = out.resolve()
    if out.is_mount():
        raise ValueError(f"cannot write to {out}: it is a mount point, expected a folder in one")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"cannot write to {out}: it is there already, expected a new or empty folder")
    return out


def _check_arguments(
    splits: Sequence[str], shard_megabytes: float, resize: int | None, quality: int, seed: int, workers: int
) -> None:
    for split in splits:
        check_split_name(split)
    if not splits or len(set(splits)) < len(splits):
        raise ValueError(f"splits must be at least one and all different, got {', '.join(splits) or 'none'}")
    if not 0 < shard_megabytes < float("inf"):
        raise ValueError(f"shard_megabytes must be greater than 0, got {shard_megabytes}")
    if resize is not None and resize < 32:
        raise ValueError(f"resize must be at least 32 pixels, got {resize}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be from 1 to 100, got {quality}")
    for name, value in (("seed", seed), ("workers", workers)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
