"""Check every file of a dataset before the first step, and report how much of the data is used.

A missing image ends MMDetection's training whenever it is drawn; a segmentation map of another size than its image
is cropped at other places and trained on without a word, and so are classes that are not those of the model. Of
images the headers are enough to see this. Label images are read in full: their values are the classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, init_default_scope
from PIL import Image
from torch import nn
from tqdm import tqdm

from hatnet_core.images import is_image_file
from hatnet_dense.annotations import (
    annotation_problems,
    content_problems,
    counted,
    leaving,
    listed,
    read_coco,
    skipped_of,
)
from hatnet_dense.errors import cut, said

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned; 5 to 8 swap height and width."""

THREADS = 8
"""Files read together: on a network file system they wait for each other."""

PHASES = {"train": "training data", "val": "validation data", "test": "test data"}
"""The data of a config, and what it is called."""

UNITS = {"boxes": ("box", "boxes"), "pixels": ("labelled pixel", "labelled pixels")}
"""What is counted in the data of detectors and of segmenters, one and many."""

LABELS = 256
"""Values of a label image."""


@HOOKS.register_module()
class DataCheckHook(Hook):  # type: ignore[misc]  # mmengine ships no types
    """Refuse data with missing or unreadable files, misread annotations or other classes; log what is used.

    Only the first process reads; all get the outcome, so that all end.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Any) -> None:
        """Check the training and the validation data."""
        _check_once(runner, runner.train_dataloader.dataset, PHASES["train"])
        if runner.val_loop is not None:
            _check_once(runner, runner.val_dataloader.dataset, PHASES["val"])

    def before_test(self, runner: Any) -> None:
        """Check the test data."""
        _check_once(runner, runner.test_dataloader.dataset, PHASES["test"])


@dataclass
class Survey:
    """The contents of a dataset, in one line as a string.

    Attributes:
        name: of the dataset.
        images: their number.
        counts: boxes or labelled pixels of each class, in the order of the classes; empty if unknown.
        unit: ``boxes`` or ``pixels``.
        skipped: what is not used, such as "2 boxes without area".
        notes: what is used and unusual.
        problems: what has to be repaired, one line each.
        files: the image files.
    """

    name: str
    images: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    unit: str = "boxes"
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.name}: {counted(self.images, 'image', 'images')}"
        if self.counts:
            total = counted(self.counts.total(), *UNITS[self.unit])
            text += f", {total} ({listed(self.shares())})"
        absent = [name for name, count in self.counts.items() if not count]
        for label, items in (("none of", absent), ("skipped", self.skipped)):
            text += f"; {label}: {listed(items)}" if items else ""
        return "; ".join([text, *self.notes])

    def shares(self) -> list[str]:
        """The classes that occur, most frequent first, with their boxes or their share of the pixels."""
        frequent = [(name, count) for name, count in self.counts.most_common() if count]
        if self.unit == "boxes":
            return [f"{name} {count:,}" for name, count in frequent]
        return [f"{name} {100 * count / self.counts.total():.1f} %" for name, count in frequent]


def check_dataset(dataset: Any, name: str) -> Survey:
    """Survey a dataset, and refuse one with problems.

    Args:
        dataset: as for :func:`survey`.
        name: what to call it.

    Raises:
        ValueError: naming the first files that are missing, unreadable, or of another size, or the annotation file
            and what is wrong with it.
    """
    found = survey(dataset, name)
    if found.problems:
        raise ValueError(f"{name}: {shortened(found.problems)}")
    return found


def shortened(problems: Sequence[str]) -> str:
    """Join the first of some problems in one line."""
    if len(problems) == 1:
        return problems[0]
    rest = "; … ('hatnet-dense check' lists all)" if len(problems) > 3 else ""
    return f"{len(problems)} problems: {'; '.join(problems[:3])}{rest}"


def survey(dataset: Any, name: str) -> Survey:
    """Compare every record of a dataset of MMDetection or MMSegmentation with its files, and count its objects.

    Args:
        dataset: the dataset, wrapped or not. Images behind an address (``s3://``, …) are not read.
        name: what to call it.
    """
    found = Survey(name)
    for part in _unwrapped(dataset):
        _survey_part(part, found)
    return found


def survey_config(config: Config) -> list[Survey]:
    """Survey all data of a config without training; the problems of its annotation files come first.

    Args:
        config: of :func:`hatnet_dense.config.load_config`.
    """
    from hatnet_dense.flops import build_model

    init_default_scope(config.default_scope)
    registry = import_module(f"{config.default_scope}.registry").DATASETS
    model = build_model(config)
    surveys: list[Survey] = []
    seen: list[Any] = []
    for phase, name in PHASES.items():
        dataset = (config.get(f"{phase}_dataloader") or {}).get("dataset")
        if dataset is None or dataset in seen:
            continue
        seen.append(dataset)
        part = Config(
            {f"{phase}_dataloader": {"dataset": dataset}, f"{phase}_evaluator": config.get(f"{phase}_evaluator")}
        )
        problems = annotation_problems(part)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints what it does
                built = registry.build(dataset)
            found = survey(built, name)
            problems += undecodable(found.files)
            problems += classes_problem(model, getattr(built, "metainfo", {}))
        except Exception as error:  # datasets are of the libraries, or of the user
            found = Survey(name, problems=[] if problems else [_unbuilt(dataset, error)])
        found.problems = list(dict.fromkeys([*problems, *found.problems]))
        surveys.append(found)
    for other in surveys[1:]:
        other.problems += same_files(surveys[0], other)
    return surveys


def undecodable(files: Sequence[Any]) -> list[str]:
    """Name the images whose pixels cannot be read; before a run only their headers are."""

    def problem(file: Any) -> str | None:
        try:
            with Image.open(file) as image:
                image.load()
        except FileNotFoundError:  # reported with its record
            return None
        except Exception as error:  # Pillow raises whatever a broken file leads to
            return f"{file} cannot be read ({error})"
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        return [found for found in tqdm(pool.map(problem, files), "decoding pictures", len(files), delay=2) if found]


def same_files(first: Survey, second: Survey) -> list[str]:
    """Name the pictures that two datasets share, found by their content."""
    files = [*first.files, *second.files]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(tqdm(pool.map(_digest, files), "comparing pictures", len(files), delay=2))
    known = dict(zip(digests[: len(first.files)], first.files, strict=True))
    pairs = [(known[d], file) for d, file in zip(digests[len(first.files) :], second.files, strict=True) if d in known]
    if not pairs:
        return []
    count = counted(len(pairs), "picture is", "pictures are")
    return [f"{count} in the {first.name} and in the {second.name}, first {pairs[0][0]} and {pairs[0][1]}"]


def no_record(dataset: Mapping[str, Any]) -> str:
    """Say what an empty dataset looked for."""
    where = [dataset.get(key) for key in ("data_root", "ann_file", "data_prefix", "img_suffix") if dataset.get(key)]
    classes = dataset.get("metainfo", {}).get("classes", f"those of {dataset.get('type')}")
    return f"no record of {where} can be used; expected images of that name, and categories among {classes}"


def is_empty(error: Exception) -> bool:
    """Return whether an error is what MMEngine's datasets raise when they are empty."""
    return "need at least one array" in str(error)


def problem_of(record: Mapping[str, Any]) -> str | None:
    """What is wrong with one record (``img_path``, ``seg_map_path``, ``height``, ``width``, ``instances``)."""
    path = record.get("img_path")
    if path is None or "://" in str(path):
        return None
    try:
        size = _size(path)
        labels = record.get("seg_map_path")
        if labels is not None and _size(labels) != size:
            return f"{labels} is {_of(_size(labels))}, its image {path} {_of(size)}"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except Image.DecompressionBombError:  # more pixels than Pillow opens, which the libraries' loader may
        return None
    except Exception as error:  # Pillow raises whatever a broken file leads to
        return f"{path} cannot be read ({error})"
    stated = (record.get("width"), record.get("height"))
    if None not in stated and stated != size:
        return f"{path} is {_of(size)}, its annotation says {_of(stated)}"
    for instance in record.get("instances", []):
        mask = instance.get("mask")
        if isinstance(mask, Mapping) and (given := tuple(mask.get("size") or ())[::-1]) != size:
            return f"{path} is {_of(size)}, a mask of it {_of(given)}"
        if isinstance(mask, Mapping) and not _decodes(mask):
            return (
                f"{path}: the run lengths of a mask of it, {str(mask.get('counts'))[:40]!r}, do not cover {_of(size)}"
            )
    return None


def check_classes(model: nn.Module, metainfo: Mapping[str, Any], name: str) -> None:
    """Compare the classes of a dataset with those of the heads of a model.

    Args:
        model: a detector or segmenter; a module with ``num_classes`` is a head.
        metainfo: of the dataset, with ``classes``; where things and stuff have heads of their own, none are compared.
        name: what to call the dataset.

    Raises:
        ValueError: naming the head and both numbers.
    """
    for problem in classes_problem(model, metainfo):
        raise ValueError(f"{name}: {problem}")


def classes_problem(model: nn.Module, metainfo: Mapping[str, Any]) -> list[str]:
    """The first head that has another number of classes than a dataset; arguments as for :func:`check_classes`."""
    classes = metainfo.get("classes")
    if not classes or "thing_classes" in metainfo:
        return []
    for place, module in model.named_modules():
        given = getattr(module, "num_classes", None)
        if not isinstance(given, int) or "rpn_head" in place or "backbone." in place:  # these know no classes
            continue
        if given != len(classes):
            return [
                f"{len(classes)} classes ({listed(classes, 3)}), model.{place}.num_classes is {given}: expected the "
                "same number; metainfo.classes of the dataset names those of the data"
            ]
    return []


def naming_files(build: Callable[..., Any]) -> Callable[..., Any]:
    """A runner's ``build_dataloader`` whose datasets say which file an error is about.

    Before the loader is used: its processes are copies.
    """

    def built(*arguments: Any, **options: Any) -> Any:
        loader = build(*arguments, **options)
        for part in _unwrapped(loader.dataset):
            if not hasattr(part, "pipeline"):
                continue
            part.pipeline = _Named(part.pipeline, part.metainfo.get("classes"), getattr(part, "ignore_index", None))
        return loader

    return built


class _Named:
    """A pipeline of transforms that says which file it failed on.

    Args:
        pipeline: from a record to what the model takes.
        classes: of the dataset.
        ignore_index: of a dataset of MMSegmentation, whose label images are compared with its classes; else None.
    """

    def __init__(self, pipeline: Any, classes: Sequence[str] | None, ignore_index: int | None) -> None:
        self._pipeline = pipeline
        self._classes = classes
        self._ignore_index = ignore_index

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._pipeline, name)

    def __call__(self, record: dict[str, Any]) -> Any:
        image, labels = record.get("img_path"), record.get("seg_map_path")
        try:
            packed = self._pipeline(record)
        except Exception as error:  # the loaders raise whatever a broken file leads to
            if image is None:
                raise
            files = f"{image} with {labels}" if labels else image
            raise ValueError(f"{files} cannot be used: {cut(said(error))}") from error
        if self._ignore_index is not None and self._classes and labels and packed is not None:
            self._check_labels(packed["data_samples"], labels)
        return packed

    def _check_labels(self, sample: Any, labels: str) -> None:
        if "gt_sem_seg" not in sample:
            return
        values = sample.gt_sem_seg.data
        unknown = values[(values >= len(self._classes or ())) & (values != self._ignore_index)]
        if len(unknown):
            classes = len(self._classes or ())
            raise ValueError(_unknown_class(labels, int(unknown[0]), classes, self._ignore_index))


def _survey_part(part: Any, found: Survey) -> None:
    """Read the files of all records of a dataset, and its annotation file, which tells what it skipped."""
    classes = list(getattr(part, "metainfo", {}).get("classes") or [])
    loader = _label_loader(part)
    reads_pictures = _reads_pictures(part)

    def inspect(i: int) -> tuple[dict[str, Any], str | None, Counter[int]]:
        record = part.get_data_info(i)
        problem = problem_of(record) if reads_pictures else None
        if loader is not None and problem is None and record.get("seg_map_path") is not None:
            problem, values = _values(record, loader, len(classes), part.ignore_index)
        else:
            values = Counter(
                one.get("bbox_label") for one in record.get("instances", []) if not one.get("ignore_flag")
            )
        return {key: record.get(key) for key in ("img_id", "img_path", "seg_map_path")}, problem, values

    counts: Counter[int] = Counter()
    problems, used = [], set()
    with ThreadPoolExecutor(THREADS) as pool:
        for record, problem, values in tqdm(
            pool.map(inspect, range(len(part))), f"checking {found.name}", len(part), delay=2
        ):
            counts += values
            problems += [] if problem is None else [problem]
            used.add(record["img_id"])
            found.files += [] if record["img_path"] is None else [str(record["img_path"])]
    found.images += len(part)
    if _is_coco(part):
        problems += _survey_coco(part, used, found)
    if loader is not None:
        problems += _survey_labels(part, counts, classes, found)
    if counts:
        for i, name in enumerate(classes):
            found.counts[str(name)] += counts[i]
    found.problems += problems


def _survey_coco(part: Any, used: set[Any], found: Survey) -> list[str]:
    """Compare a CocoDataset with its annotation file: the problems; what is skipped goes to ``found``."""
    classes = list(part.metainfo.get("classes") or [])
    needs_masks = any(getattr(step, "with_mask", False) for step in _transforms(part))
    if "://" in str(part.ann_file):
        return []
    content = read_coco(part.ann_file)
    problems = content_problems(content, part.ann_file, classes, needs_masks)
    if not problems:
        found.skipped += skipped_of(content, used, classes, (part.filter_cfg or {}).get("min_size", 0))
        if count := leaving(content):
            found.notes.append(f"{counted(count, 'box', 'boxes')} beyond the edge of the image")
    return problems


def _survey_labels(part: Any, counts: Counter[int], classes: list[Any], found: Survey) -> list[str]:
    """Move what is ignored of a dataset of MMSegmentation from ``counts`` to ``found``: the problems."""
    found.unit = "pixels"
    found.skipped += _other_files(part)
    ignored = counts.pop(part.ignore_index, 0)
    if not ignored:
        return []
    found.skipped.append(f"{100 * ignored / (ignored + counts.total()):.1f} % of the pixels, without a class")
    if len(classes) < 2 or not set(counts) <= {0}:
        return []
    left = f"class {classes[0]} and {part.ignore_index}" if counts else f"{part.ignore_index}"
    return [
        f"{part.get_data_info(0)['seg_map_path']}: label images must have the classes 0 to {len(classes) - 1}, got "
        f"{left} in all of them, which is ignored (reduce_zero_label={part.reduce_zero_label})"
    ]


def _values(record: dict[str, Any], loader: Any, classes: int, ignore_index: int) -> tuple[str | None, Counter[int]]:
    """Count the pixels of each class in the label image of a record, as the training loads it."""
    path = record["seg_map_path"]
    if "://" in str(path):
        return None, Counter()
    try:
        with Image.open(path) as image:
            bands = len(image.getbands())
            highest: Any = image.getextrema()[1] if image.mode.startswith(("I", "F")) else 0
        if bands > 1:
            return (
                f"{path}: a label image must have one channel, whose values are classes, got {image.mode}",
                Counter(),
            )
        if highest >= LABELS:
            return f"{path}: values of a label image must be from 0 to {LABELS - 1}, got {highest}", Counter()
        values = np.bincount(loader(record)["gt_seg_map"].ravel(), minlength=LABELS)
    except Exception as error:  # the loaders raise whatever a broken file leads to
        return f"{path} cannot be read ({cut(said(error))})", Counter()
    counts = Counter({i: int(n) for i, n in enumerate(values) if n})
    unknown = [i for i in counts if i >= classes and i != ignore_index]
    return (_unknown_class(path, unknown[0], classes, ignore_index), Counter()) if unknown else (None, counts)


def _unknown_class(path: Any, value: int, classes: int, ignore_index: int | None) -> str:
    return (
        f"{path} has the class {value} (after reduce_zero_label, if that is set): "
        f"expected 0 to {classes - 1}, or {ignore_index} for none"
    )


def _other_files(part: Any) -> list[str]:
    """Count the images in the folder of a dataset of MMSegmentation that have another suffix than its own."""
    folder = Path(part.data_prefix.get("img_path") or "")
    if part.ann_file or not folder.is_dir():
        return []
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    others = sorted(path for path in paths if is_image_file(path) and not path.name.endswith(part.img_suffix))
    if not others:
        return []
    count = counted(len(others), "file does", "files do")
    return [f"{count} not end in {part.img_suffix}, first {others[0]}"]


def _unbuilt(dataset: Mapping[str, Any], error: Exception) -> str:
    from hatnet_dense.config import innermost

    if is_empty(error):
        return no_record(innermost(dataset))
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is missing" if error.filename else str(error)
    return cut(said(error))


def _is_coco(dataset: Any) -> bool:
    """Return whether a dataset reads COCO's format as CocoDataset does; LVIS and others derive from it."""
    kind = next((kind for kind in type(dataset).__mro__ if kind.__name__ == "CocoDataset"), None)
    return kind is not None and getattr(type(dataset), "load_data_list", None) is getattr(kind, "load_data_list", None)


def _label_loader(dataset: Any) -> Any:
    """The transform of a dataset of MMSegmentation that loads its label images; None for other datasets."""
    if not hasattr(dataset, "ignore_index"):
        return None
    kinds = [(step, [kind.__name__ for kind in type(step).__mro__]) for step in _transforms(dataset)]
    return next((step for step, names in kinds if "LoadAnnotations" in names), None)


def _transforms(dataset: Any) -> Sequence[Any]:
    return getattr(getattr(dataset, "pipeline", None), "transforms", None) or ()


def _digest(path: str) -> bytes:
    if not Path(path).is_file():  # reported elsewhere, or behind an address
        return path.encode()
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _check_once(runner: Any, dataset: Any, name: str) -> None:
    outcome: list[str | None] = [None]
    if is_main_process():
        try:
            check_classes(runner.model, getattr(dataset, "metainfo", {}), name)
            runner.logger.info(str(check_dataset(dataset, name)))
        except Exception as error:  # whatever it is: the other processes wait
            outcome = [str(error) or type(error).__name__]
    broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise ValueError(outcome[0])


def _unwrapped(dataset: Any) -> Iterator[Any]:
    """The datasets inside of concatenated, repeated and mixed ones."""
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from _unwrapped(part)
    elif hasattr(dataset, "dataset"):
        yield from _unwrapped(dataset.dataset)
    elif hasattr(dataset, "get_data_info"):  # else its records are in no form that is known here
        yield dataset


def _reads_pictures(dataset: Any) -> bool:
    """Whether records are loaded as pictures, as far as can be seen: others may be in formats that Pillow lacks."""
    transforms = _transforms(dataset)
    if not transforms:
        return True
    return any(kind.__name__ == "LoadImageFromFile" for kind in type(transforms[0]).__mro__)


def _decodes(mask: Mapping[str, Any]) -> bool:
    """Whether the run lengths of a mask, compressed or not, add up to its size."""
    counts, (height, width) = mask.get("counts"), mask["size"]
    if isinstance(counts, str | bytes):
        counts = _run_lengths(counts.encode() if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        return False
    return bool(sum(counts) == height * width)


def _run_lengths(text: bytes) -> list[int]:
    """COCO's compressed run lengths as numbers; its own decoder reads beyond the end of damaged ones.

    Five bits a character from 48 on, the lowest first, bit 5 for one more and bit 4 of the last for the sign; from the
    fourth number on, the difference to the last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts


def _size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as it is to be seen, from its header."""
    with Image.open(path) as image:
        width, height = image.size
        # of a PNG, Pillow would decode all to find it
        turned = image.format != "PNG" and image.getexif().get(ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def _of(size: tuple[Any, ...]) -> str:
    return "×".join(map(str, size)) or "without a size"
