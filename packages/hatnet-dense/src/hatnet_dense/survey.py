"""Survey the data of a config: contents, what is skipped, and problems.

``DataCheckHook`` surveys before the first step; ``hatnet-dense check`` also decodes and compares all pictures. Start
reading at :func:`survey`.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
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
from hatnet_dense.records import count_labels, missing, problem_of, unreadable

THREADS = 8
"""Files read at once, because a network file system answers each one late."""

PHASES = {"train": "training data", "val": "validation data", "test": "test data"}
"""The phases of a config, and the names of their data."""

UNITS = {"boxes": ("box", "boxes"), "pixels": ("labelled pixel", "labelled pixels")}
"""Objects counted for detectors and segmenters, singular and plural."""


@dataclass
class Survey:
    """Contents of a dataset; as a string, one line."""

    name: str
    """Name of the dataset in messages."""

    images: int = 0
    """Number of images."""

    counts: Counter[str] = field(default_factory=Counter)
    """Boxes or labelled pixels of each class, in the order of the classes; empty if unknown."""

    unit: str = "boxes"
    """``boxes`` or ``pixels``."""

    skipped: list[str] = field(default_factory=list)
    """Unused data, such as "2 boxes without area"."""

    notes: list[str] = field(default_factory=list)
    """Unusual data that is used."""

    problems: list[str] = field(default_factory=list)
    """Data to repair, one line each."""

    files: list[str] = field(default_factory=list)
    """Image files."""

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
        """List the classes that occur, most frequent first, with their boxes or their share of the pixels."""
        frequent = [(name, count) for name, count in self.counts.most_common() if count]
        if self.unit == "boxes":
            return [f"{name} {count:,}" for name, count in frequent]
        return [f"{name} {100 * count / self.counts.total():.1f} %" for name, count in frequent]


def survey(dataset: Any, name: str) -> Survey:
    """Compare every record of a dataset with its files, and count its objects.

    Args:
        dataset: of MMDetection or MMSegmentation, wrapped or not. Remote images (``s3://``, …) are not read.
        name: of the dataset in messages.
    """
    found = Survey(name)
    for part in unwrapped(dataset):
        _survey_part(part, found)
    return found


def survey_config(config: Config) -> list[Survey]:
    """Survey all data of a config without training; problems of annotation files come first.

    Args:
        config: from :func:`hatnet_dense.config.load_config`.
    """
    from hatnet_dense.flops import build_model

    init_default_scope(config.default_scope)
    model = build_model(config)
    surveys: list[Survey] = []
    seen: list[Any] = []
    for phase, name in PHASES.items():
        dataset = (config.get(f"{phase}_dataloader") or {}).get("dataset")
        if dataset is None or dataset in seen:
            continue
        seen.append(dataset)
        part = {f"{phase}_dataloader": {"dataset": dataset}, f"{phase}_evaluator": config.get(f"{phase}_evaluator")}
        surveys.append(_survey_phase(config.default_scope, model, dataset, name, annotation_problems(Config(part))))
    for other in surveys[1:]:
        other.problems += same_files(surveys[0], other)
    return surveys


def undecodable(files: Sequence[Any]) -> list[str]:
    """Describe the images whose pixels cannot be read."""

    def problem(file: Any) -> str | None:
        try:
            with Image.open(file) as image:
                image.load()
        except FileNotFoundError:  # reported with its record
            return None
        except Exception as error:  # Pillow raises anything on a broken file
            return unreadable(file, error)
        return None

    with ThreadPoolExecutor(THREADS) as pool:
        return [found for found in tqdm(pool.map(problem, files), "decoding pictures", len(files), delay=2) if found]


def same_files(first: Survey, second: Survey) -> list[str]:
    """Describe pictures that are in two datasets, compared by content."""
    files = [*first.files, *second.files]
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(tqdm(pool.map(_digest, files), "comparing pictures", len(files), delay=2))
    known = dict(zip(digests[: len(first.files)], first.files, strict=True))
    pairs = [(known[d], file) for d, file in zip(digests[len(first.files) :], second.files, strict=True) if d in known]
    if not pairs:
        return []
    count = counted(len(pairs), "picture is", "pictures are")
    return [f"{count} in both {first.name} and {second.name}, first {pairs[0][0]} and {pairs[0][1]}"]


def classes_problem(model: nn.Module, metainfo: Mapping[str, Any]) -> list[str]:
    """Describe the first head with another number of classes than a dataset.

    Args:
        model: a detector or segmenter; modules with ``num_classes`` are heads.
        metainfo: of the dataset, with ``classes``. With ``thing_classes``, heads differ and none is compared.
    """
    classes = metainfo.get("classes")
    if not classes or "thing_classes" in metainfo:
        return []
    for place, module in model.named_modules():
        given = getattr(module, "num_classes", None)
        if not isinstance(given, int) or "rpn_head" in place or "backbone." in place:  # these do not classify
            continue
        if given != len(classes):
            return [
                f"model.{place}.num_classes must be {len(classes)}, the number of classes of the dataset "
                f"({listed(classes, 3)}; metainfo.classes changes them), got {given}"
            ]
    return []


def no_record(dataset: Mapping[str, Any]) -> str:
    """Describe an empty dataset by what it looked for."""
    where = [dataset.get(key) for key in ("data_root", "ann_file", "data_prefix", "img_suffix") if dataset.get(key)]
    classes = dataset.get("metainfo", {}).get("classes", f"those of {dataset.get('type')}")
    return f"no usable record in {where}; expected images of that name, and categories among {classes}"


def is_empty(error: Exception) -> bool:
    """Recognise the error that MMEngine's datasets raise if they are empty."""
    return "need at least one array" in str(error)


def unwrapped(dataset: Any) -> Iterator[Any]:
    """Yield the datasets inside of concatenated, repeated and mixed ones."""
    if hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from unwrapped(part)
    elif hasattr(dataset, "dataset"):
        yield from unwrapped(dataset.dataset)
    elif hasattr(dataset, "get_data_info"):  # other datasets have no records of a known form
        yield dataset


def _survey_phase(scope: str, model: nn.Module, dataset: Any, name: str, problems: list[str]) -> Survey:
    """Build and survey the dataset of a config, whose annotation files have these problems."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # pycocotools prints its progress
            built = import_module(f"{scope}.registry").DATASETS.build(dataset)
        found = survey(built, name)
        problems += undecodable(found.files)
        problems += classes_problem(model, getattr(built, "metainfo", {}))
    except Exception as error:  # the dataset may be of a library or of the user
        found = Survey(name, problems=[] if problems else [_unbuilt(dataset, error)])
    found.problems = list(dict.fromkeys([*problems, *found.problems]))
    return found


def _survey_part(part: Any, found: Survey) -> None:
    """Add the records of one dataset, and of its annotation file, to a survey."""
    classes = list(getattr(part, "metainfo", {}).get("classes") or [])
    loader = _label_loader(part)
    reads_pictures = _reads_pictures(part)

    def inspect(i: int) -> tuple[dict[str, Any], str | None, Counter[int]]:
        record = part.get_data_info(i)
        problem = problem_of(record) if reads_pictures else None
        if loader is not None and problem is None and record.get("seg_map_path") is not None:
            problem, values = count_labels(record, loader, len(classes), part.ignore_index)
        else:
            instances = record.get("instances", [])
            values = Counter(one.get("bbox_label") for one in instances if not one.get("ignore_flag"))
        return {key: record.get(key) for key in ("img_id", "img_path")}, problem, values

    counts: Counter[int] = Counter()
    used = set()
    with ThreadPoolExecutor(THREADS) as pool:
        inspected = pool.map(inspect, range(len(part)))
        for record, problem, values in tqdm(inspected, f"checking {found.name}", len(part), delay=2):
            counts += values
            found.problems += [] if problem is None else [problem]
            used.add(record["img_id"])
            found.files += [] if record["img_path"] is None else [str(record["img_path"])]
    found.images += len(part)
    if _is_coco(part):
        _survey_coco(part, used, found)
    if loader is not None:
        _survey_labels(part, counts, classes, found)
    if counts:
        for i, name in enumerate(classes):
            found.counts[str(name)] += counts[i]


def _survey_coco(part: Any, used: set[Any], found: Survey) -> None:
    """Compare a CocoDataset, which uses the images ``used``, with its annotation file."""
    if "://" in str(part.ann_file):
        return
    classes = list(part.metainfo.get("classes") or [])
    needs_masks = any(getattr(step, "with_mask", False) for step in _transforms(part))
    content = read_coco(part.ann_file)
    problems = content_problems(content, part.ann_file, classes, needs_masks)
    found.problems += problems
    if not problems:
        found.skipped += skipped_of(content, used, classes, (part.filter_cfg or {}).get("min_size", 0))
        if count := leaving(content):
            found.notes.append(f"{counted(count, 'box', 'boxes')} beyond the edge of the image")


def _survey_labels(part: Any, counts: Counter[int], classes: list[Any], found: Survey) -> None:
    """Move the ignored pixels of a dataset of MMSegmentation from ``counts`` to the skipped data."""
    found.unit = "pixels"
    found.skipped += _other_files(part)
    ignored = counts.pop(part.ignore_index, 0)
    if not ignored:
        return
    found.skipped.append(f"{100 * ignored / (ignored + counts.total()):.1f} % of the pixels, without a class")
    if len(classes) < 2 or not set(counts) <= {0}:
        return
    left = f"class {classes[0]} and {part.ignore_index}" if counts else f"{part.ignore_index}"
    found.problems.append(
        f"{part.get_data_info(0)['seg_map_path']}: label images must have the classes 0 to {len(classes) - 1}, got "
        f"{left} in all of them, which is ignored (reduce_zero_label={part.reduce_zero_label})"
    )


def _other_files(part: Any) -> list[str]:
    """Count the images that a dataset of MMSegmentation skips for their suffix."""
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
    return missing(error) if isinstance(error, FileNotFoundError) else cut(said(error))


def _transforms(dataset: Any) -> Sequence[Any]:
    return getattr(getattr(dataset, "pipeline", None), "transforms", None) or ()


def _is(value: Any, name: str) -> bool:
    """Compare the classes of an object by name, because MMDetection or MMSegmentation may be missing."""
    return any(kind.__name__ == name for kind in type(value).__mro__)


def _is_coco(dataset: Any) -> bool:
    """Recognise datasets that read COCO's format as CocoDataset does; LVIS and others derive from it."""
    kind = next((kind for kind in type(dataset).__mro__ if kind.__name__ == "CocoDataset"), None)
    return kind is not None and getattr(type(dataset), "load_data_list", None) is getattr(kind, "load_data_list", None)


def _label_loader(dataset: Any) -> Any:
    """Return the transform of a dataset of MMSegmentation that loads label images; None for other datasets."""
    if not hasattr(dataset, "ignore_index"):
        return None
    return next((step for step in _transforms(dataset) if _is(step, "LoadAnnotations")), None)


def _reads_pictures(dataset: Any) -> bool:
    """Recognise datasets of pictures; the files of other loaders may be in formats that Pillow lacks."""
    transforms = _transforms(dataset)
    return not transforms or _is(transforms[0], "LoadImageFromFile")


def _digest(path: str) -> bytes:
    if not Path(path).is_file():  # missing, which is reported with its record, or remote
        return path.encode()
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
