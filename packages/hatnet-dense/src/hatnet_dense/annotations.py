"""Check COCO annotation files, and count data that MMDetection skips.

MMDetection and pycocotools read such a file without checks: a missing key is a bare KeyError, an annotation of an
unlisted image or category is skipped silently, and classes are numbered in the order of the file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

NEEDED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area"),
    "categories": ("id", "name"),
}
"""Lists of a file, and the keys that each record needs."""

NUMBERS = ("height", "width", "area")
"""Keys whose values are numbers from 0."""

NEARLY_ALL, MANY = 0.97, 0.25
"""Shares of the boxes of a file that prove another format of all its boxes."""

SLACK = 1.0
"""Pixels that a box may reach beyond its image, because some tools count pixels from 1 and others round up."""

Problem = tuple[str, str]
"""A kind of problem, and a message about one record."""


def coco_problems(path: str | Path, classes: Sequence[str] | None = None, masks: bool = False) -> list[str]:
    """Describe data of a file that MMDetection cannot use or would misread, one line per kind of problem.

    Args:
        path: the file; a remote one (``s3://``, …) is not read.
        classes: classes of the dataset, in order, which the categories must include; None for any.
        masks: require a mask of every object.
    """
    if "://" in str(path):
        return []
    try:
        content = read_coco(path)
    except OSError:  # reported where the file is used
        return []
    except ValueError as error:
        return [str(error)]
    return content_problems(content, path, classes, masks)


def content_problems(
    content: Any, path: str | Path, classes: Sequence[str] | None = None, masks: bool = False
) -> list[str]:
    """Describe the problems of the content of a file; arguments as for :func:`coco_problems`."""
    found = list(_incomplete(content)) or [*_inconsistent(content), *_box_problems(content)]
    if classes is not None and not found:
        found += _class_problems([category["name"] for category in content["categories"]], list(classes))
    if masks and not found:
        found += _without_mask(content, classes)
    firsts: dict[str, str] = {}
    for kind, message in found:
        firsts.setdefault(kind, message)
    counts = Counter(kind for kind, _ in found)
    more = {kind: f" (and {count - 1:,} more)" if count > 1 else "" for kind, count in counts.items()}
    return [f"{path}: {message}{more[kind]}" for kind, message in firsts.items()]


def annotation_problems(config: Config) -> list[str]:
    """Describe the problems of all COCO files that data and evaluators of a config name."""
    problems = [problem for path, masks in _annotation_files(config) for problem in coco_problems(path, masks=masks)]
    return list(dict.fromkeys(problems))


def read_coco(path: str | Path) -> Any:
    """Read an annotation file.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def skipped_of(content: Mapping[str, Any], used: Container[Any], classes: Sequence[str], min_size: int) -> list[str]:
    """Count the data that MMDetection skips, such as "2 boxes without area".

    Args:
        content: content of a file without problems.
        used: ids of the images in the dataset.
        classes: classes of the dataset.
        min_size: ``filter_cfg.min_size``, in pixels.
    """
    names, images = _names(content), _images(content)
    with_objects = {a["image_id"] for a in content["annotations"] if names[a["category_id"]] in classes}
    found: Counter[tuple[str, str, str]] = Counter()
    for key, image in images.items():
        if key in used:
            continue
        if key not in with_objects:
            found["image", "images", "without objects (filter_cfg.filter_empty_gt)"] += 1
        elif min(image["width"], image["height"]) < min_size:
            found["image", "images", f"below {min_size} pixels (filter_cfg.min_size)"] += 1
        else:
            found["image", "images", "not among dataset.indices"] += 1
    others: set[str] = set()
    for annotation in content["annotations"]:
        if annotation["image_id"] not in used:
            continue
        if annotation.get("ignore"):
            found["box", "boxes", "marked as ignored"] += 1
        elif _without_area(annotation, images[annotation["image_id"]]):
            found["box", "boxes", "without area"] += 1
        elif names[annotation["category_id"]] not in classes:
            found["box", "boxes", "of other categories"] += 1
            others.add(str(names[annotation["category_id"]]))
        elif annotation.get("iscrowd"):
            found["crowd region", "crowd regions", ""] += 1
    lines = []
    for (one, many, why), count in found.items():
        named = f" ({listed(sorted(others))})" if why == "of other categories" else ""
        lines.append(f"{counted(count, one, many)} {why}".rstrip() + named)
    return lines


def leaving(content: Mapping[str, Any]) -> int:
    """Count the boxes that reach beyond their image."""
    images = _images(content)
    return sum(_leaves(a["bbox"], images[a["image_id"]]) for a in content["annotations"])


def counted(number: int, one: str, many: str) -> str:
    """Format a number with its noun, such as "1 box" or "2,804 boxes"."""
    return f"{number:,} {one if number == 1 else many}"


def listed(names: Sequence[Any], most: int = 5) -> str:
    """Join the first few names, with an ellipsis for the rest."""
    return ", ".join([*map(str, names[:most]), *(["…"] if len(names) > most else [])])


def _images(content: Mapping[str, Any]) -> dict[Any, Mapping[str, Any]]:
    return {image["id"]: image for image in content["images"]}


def _names(content: Mapping[str, Any]) -> dict[Any, str]:
    return {category["id"]: category["name"] for category in content["categories"]}


def _incomplete(content: Any) -> Iterator[Problem]:
    """Find missing or invalid lists, keys and values, without which nothing else can be checked."""
    for name, keys in NEEDED.items():
        records = content.get(name) if isinstance(content, Mapping) else None
        if not isinstance(records, list):
            yield name, f"{name} must be a list, as in COCO's format, got {type(records).__name__}"
            continue
        for i, record in enumerate(records):
            missing = [key for key in keys if not isinstance(record, Mapping) or record.get(key) is None]
            if missing:
                yield f"{name} {missing[0]}", f"{name}[{i}] must have {missing[0]}, got {str(record)[:80]}"
                continue
            for key in keys:
                expected = _expected(key, record[key])
                if expected:
                    yield f"{name} {key}", f"{name}[{i}].{key} must be {expected}, got {str(record[key])[:80]!r}"
            expected = _expected_mask(record.get("segmentation"))
            if expected:
                shown = str(record["segmentation"])[:80]
                yield f"{name} segmentation", f"{name}[{i}].segmentation must be {expected}, got {shown}"


def _expected(key: str, value: Any) -> str | None:
    if key == "bbox":
        right = isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
        return None if right and min(value[2:]) >= 0 else "[x, y, width, height]"
    if key == "id" or key.endswith("_id"):
        return None if _is_number(value) and value == int(value) else "a whole number"
    if key in NUMBERS:
        return None if _is_number(value) and value >= 0 else "a number from 0"
    return None if isinstance(value, str) else "a string"


def _expected_mask(mask: Any) -> str | None:
    if isinstance(mask, Mapping) and not (mask.get("counts") and mask.get("size")):
        return "run lengths with counts and size"
    if isinstance(mask, list) and not all(isinstance(polygon, list) for polygon in mask):
        return "a list of polygons [[x1, y1, x2, y2, …], …]"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _inconsistent(content: Mapping[str, Any]) -> Iterator[Problem]:
    """Find ids that are repeated or unknown, and the id that pycocotools takes for "not found"."""
    known = {}
    for name in NEEDED:
        known[name] = seen = dict[Any, int]()
        for i, record in enumerate(content[name]):
            first = seen.setdefault(record["id"], i)
            if first != i:
                message = f"{name}[{i}].id must be unique, got {record['id']}, which is the id of {name}[{first}]"
                yield f"repeated {name}", message
    for i, annotation in enumerate(content["annotations"]):
        for key, name in (("image_id", "images"), ("category_id", "categories")):
            if annotation[key] not in known[name]:
                message = f"annotations[{i}].{key} must be the id of one of {name}, got {annotation[key]}"
                yield f"unknown {key}", message
        if annotation["id"] == 0:
            # pycocotools marks a matched box with the id, and an unmatched one with 0
            yield "zero", f"annotations[{i}].id must be from 1, got 0, which pycocotools counts as not found"


def _box_problems(content: Mapping[str, Any]) -> Iterator[Problem]:
    """Find boxes outside of their image, and files whose boxes are not [x, y, width, height] in pixels."""
    images = _images(content)
    boxes = [
        (i, annotation["bbox"], images[annotation["image_id"]])
        for i, annotation in enumerate(content["annotations"])
        if annotation["image_id"] in images
    ]
    relative = [(i, box) for i, box, _ in boxes if 0 < max(box) <= 1]
    if boxes and len(relative) >= NEARLY_ALL * len(boxes):
        i, box = relative[0]
        yield "relative", f"annotations[{i}].bbox must be in pixels, got {box}; the boxes of the file are from 0 to 1"
        return
    beyond = [place for place in boxes if _leaves(place[1], place[2])]
    fitting = sum(_fits_as_corners(box, image) for _, box, image in boxes)
    if len(beyond) >= MANY * len(boxes) > 0 and fitting >= NEARLY_ALL * len(boxes):
        i, box, image = beyond[0]
        yield (
            "corners",
            f"annotations[{i}].bbox must be [x, y, width, height], got {box} in an image of "
            f"{image['width']}×{image['height']}; the boxes of the file fit as [x1, y1, x2, y2]",
        )
        return
    for i, box, image in beyond:
        if min(box[2:]) < 1:
            continue
        if box[0] >= image["width"] or box[1] >= image["height"] or box[0] + box[2] <= 0 or box[1] + box[3] <= 0:
            size = f"{image['width']}×{image['height']}"
            yield "outside", f"annotations[{i}].bbox must overlap its image of {size}, got {box}"


def _leaves(box: Sequence[float], image: Mapping[str, Any]) -> bool:
    x, y, width, height = box
    return min(x, y) < -SLACK or x + width > image["width"] + SLACK or y + height > image["height"] + SLACK


def _fits_as_corners(box: Sequence[float], image: Mapping[str, Any]) -> bool:
    x1, y1, x2, y2 = box
    return min(x1, y1) >= -SLACK and x1 <= x2 <= image["width"] + SLACK and y1 <= y2 <= image["height"] + SLACK


def _without_area(annotation: Mapping[str, Any], image: Mapping[str, Any]) -> bool:
    """Apply the rule of MMDetection's CocoDataset, which skips such a box."""
    x, y, width, height = annotation["bbox"]
    visible_width = min(x + width, image["width"]) - max(x, 0)
    visible_height = min(y + height, image["height"]) - max(y, 0)
    return bool(annotation["area"] <= 0 or min(width, height) < 1 or min(visible_width, visible_height) <= 0)


def _class_problems(categories: list[str], classes: list[str]) -> Iterator[Problem]:
    """Compare categories and classes; MMDetection numbers the classes in the order of the file."""
    found = [name for name in categories if name in classes]
    if found == classes:
        return
    if set(found) == set(classes):
        yield "classes", f"categories must be in the order of metainfo.classes, {listed(classes)}, got {listed(found)}"
        return
    missing = [name for name in classes if name not in found]
    yield (
        "classes",
        f"categories must include the {len(classes)} classes of metainfo.classes, got "
        f"{listed(categories)} without {listed(missing)}",
    )


def _without_mask(content: Mapping[str, Any], classes: Sequence[str] | None) -> Iterator[Problem]:
    names, images = _names(content), _images(content)
    for i, annotation in enumerate(content["annotations"]):
        if annotation.get("segmentation") or annotation.get("ignore"):
            continue
        if _without_area(annotation, images[annotation["image_id"]]):
            continue
        if classes is None or names[annotation["category_id"]] in classes:
            yield "mask", f"annotations[{i}] must have segmentation for this config, got {str(annotation)[:80]}"


def _annotation_files(config: Config) -> Iterator[tuple[str, bool]]:
    """Yield the paths of annotation files, and whether they need masks."""
    for phase in ("train", "val", "test"):
        yield from _dataset_files((config.get(f"{phase}_dataloader") or {}).get("dataset"))
        evaluators = config.get(f"{phase}_evaluator") or []
        for evaluator in [evaluators] if isinstance(evaluators, Mapping) else evaluators:
            if evaluator.get("type") == "CocoMetric" and evaluator.get("ann_file"):
                yield evaluator["ann_file"], "segm" in (evaluator.get("metric") or "")


def _dataset_files(dataset: Any) -> Iterator[tuple[str, bool]]:
    if not isinstance(dataset, Mapping):
        return
    for part in [dataset.get("dataset"), *(dataset.get("datasets") or [])]:
        yield from _dataset_files(part)
    if dataset.get("type") == "CocoDataset" and dataset.get("ann_file"):
        masks = any(step.get("with_mask") for step in dataset.get("pipeline") or [] if isinstance(step, Mapping))
        yield str(Path(dataset.get("data_root") or "") / dataset["ann_file"]), masks
