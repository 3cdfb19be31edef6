"""What is wrong with an annotation file in COCO's format, in one line that names the file and the record.

MMDetection reads such a file as it is: what is missing is a KeyError without a name, an annotation of an image that is
not listed is left out silently, and classes are numbered in the order in which the file lists them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}
"""The lists of a file, and what each of their records has to say."""


def problem_of_coco(path: str | Path, classes: Sequence[str] | None = None) -> str | None:
    """The first thing in a file that MMDetection cannot use.

    Args:
        path: the file; one behind an address (``s3://``, …) is not looked at.
        classes: those of the dataset, in order, to be found among the categories; None for any.
    """
    if "://" in str(path):
        return None
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError:  # whoever opens it says so
        return None
    except ValueError as error:
        return f"{path} is no JSON ({error})"
    defect = _record_problem(content) or _unknown_image(content)
    if defect is None and classes is not None:
        defect = _class_problem([category["name"] for category in content["categories"]], list(classes))
    return None if defect is None else f"{path}: {defect}"


def annotation_problem(config: Config) -> str | None:
    """The first problem of all the COCO files that a config names for its data and evaluators."""
    for path in dict.fromkeys(_annotation_files(config)):
        found = problem_of_coco(path)
        if found is not None:
            return found
    return None


def _record_problem(content: Any) -> str | None:
    for name, keys in NEEDED.items():
        records = content.get(name) if isinstance(content, Mapping) else None
        if not isinstance(records, list):
            return f"expected a list under {name!r}, as in COCO's format"
        for i, record in enumerate(records):
            missing = [key for key in keys if not isinstance(record, Mapping) or record.get(key) is None]
            if missing:
                return f"{name}[{i}] has no {missing[0]}: {str(record)[:80]}"
    for i, annotation in enumerate(content["annotations"]):
        if not isinstance(annotation["bbox"], list) or len(annotation["bbox"]) != 4:
            return f"annotations[{i}].bbox must be [x, y, width, height], got {annotation['bbox']!r}"
        mask = annotation.get("segmentation")
        if isinstance(mask, Mapping) and (not mask.get("counts") or not mask.get("size")):
            return f"annotations[{i}].segmentation must have counts and size, got {str(mask)[:80]}"
    return None


def _unknown_image(content: Mapping[str, Any]) -> str | None:
    known = {image["id"] for image in content["images"]}
    for i, annotation in enumerate(content["annotations"]):
        if annotation["image_id"] not in known:
            return f"annotations[{i}] is of image_id {annotation['image_id']!r}, which is none of the images"
    return None


def _class_problem(categories: list[str], classes: list[str]) -> str | None:
    """MMDetection gives the classes that it finds the numbers 0, 1, … in the order of the file."""
    found = [name for name in categories if name in classes]
    if found == classes:
        return None
    if set(found) == set(classes):
        return f"its categories are in the order {found}: expected that of the config's metainfo.classes, {classes}"
    return f"it has {len(found)} of the {len(classes)} classes of the config: expected metainfo.classes={categories}"


def _annotation_files(config: Config) -> Iterator[str]:
    for phase in ("train", "val", "test"):
        yield from _dataset_files((config.get(f"{phase}_dataloader") or {}).get("dataset"))
        evaluators = config.get(f"{phase}_evaluator") or []
        for evaluator in [evaluators] if isinstance(evaluators, Mapping) else evaluators:
            if evaluator.get("type") == "CocoMetric" and evaluator.get("ann_file"):
                yield evaluator["ann_file"]


def _dataset_files(dataset: Any) -> Iterator[str]:
    if not isinstance(dataset, Mapping):
        return
    for part in [dataset.get("dataset"), *(dataset.get("datasets") or [])]:
        yield from _dataset_files(part)
    if dataset.get("type") == "CocoDataset" and dataset.get("ann_file"):
        yield str(Path(dataset.get("data_root") or "") / dataset["ann_file"])
