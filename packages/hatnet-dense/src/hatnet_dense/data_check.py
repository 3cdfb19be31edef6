"""A look at every file of a dataset before the first step, instead of a traceback, or worse, hours later.

A missing image ends MMDetection's training whenever it is drawn; a segmentation map of another size than its image
is cropped at other places and trained on without a word. The headers of the files are enough to see both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned; 5 to 8 swap height and width."""

THREADS = 8
"""Files looked at together: on a network file system they wait for each other."""


@HOOKS.register_module()
class DataCheckHook(Hook):  # type: ignore[misc]  # mmengine ships no types
    """Refuses datasets with missing or unreadable images, and annotations of another size than their image.

    Only the first process reads; all are told, so that all end.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Any) -> None:
        """Check the training and the validation data."""
        _check_once(runner.train_dataloader.dataset, "training data")
        if runner.val_loop is not None:
            _check_once(runner.val_dataloader.dataset, "validation data")

    def before_test(self, runner: Any) -> None:
        """Check the test data."""
        _check_once(runner.test_dataloader.dataset, "test data")


def check_dataset(dataset: Any, name: str) -> None:
    """Compare every record of a dataset of MMDetection or MMSegmentation with its files.

    Args:
        dataset: the dataset, wrapped as it may be. Images behind an address (``s3://``, …) are not looked at.
        name: what to call it.

    Raises:
        ValueError: naming the first files that are missing, unreadable, or of another size.
    """
    places = [(plain, i) for plain in _unwrapped(dataset) for i in range(len(plain))]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda place: problem_of(place[0].get_data_info(place[1])), places)
        problems = [problem for problem in tqdm(found, f"checking {name}", len(places), delay=2) if problem]
    if problems:
        shown = "; ".join(problems[:3]) + ("; …" if len(problems) > 3 else "")
        raise ValueError(f"{name}: {len(problems)} of {len(places)} records cannot be used: {shown}")


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
    except (UnidentifiedImageError, OSError) as error:
        return f"{path} cannot be read ({error})"
    stated = (record.get("width"), record.get("height"))
    if None not in stated and stated != size:
        return f"{path} is {_of(size)}, its annotation says {_of(stated)}"
    for instance in record.get("instances", []):
        mask = instance.get("mask")
        if isinstance(mask, Mapping) and (given := tuple(mask.get("size", ()))[::-1]) != size:
            return f"{path} is {_of(size)}, a mask of it {_of(given)}"
    return None


def _check_once(dataset: Any, name: str) -> None:
    outcome: list[str | None] = [None]
    if is_main_process():
        try:
            check_dataset(dataset, name)
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


def _size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as it is to be seen, from its header."""
    with Image.open(path) as image:
        width, height = image.size
        # of a PNG, Pillow would decode all to find it
        turned = image.format != "PNG" and image.getexif().get(ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def _of(size: tuple[Any, ...]) -> str:
    return "×".join(map(str, size)) or "without a size"
