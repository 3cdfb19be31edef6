"""A look at every file of a dataset before the first step, instead of a traceback, or worse, hours later.

A missing image ends MMDetection's training whenever it is drawn; a segmentation map of another size than its image
is cropped at other places and trained on without a word, and so are classes that are not those of the model. The
headers of the files are enough to see all of this; what is wrong further inside ends the run where it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from PIL import Image
from torch import nn
from tqdm import tqdm

from hatnet_dense.annotations import problem_of_coco
from hatnet_dense.errors import cut, said

ORIENTATION = 0x0112
"""The EXIF tag that says how a picture is to be turned; 5 to 8 swap height and width."""

THREADS = 8
"""Files looked at together: on a network file system they wait for each other."""


@HOOKS.register_module()
class DataCheckHook(Hook):  # type: ignore[misc]  # mmengine ships no types
    """Refuses datasets with missing or unreadable images, annotations of another size than their image, other classes.

    Only the first process reads; all are told, so that all end.
    """

    priority = "VERY_HIGH"

    def before_train(self, runner: Any) -> None:
        """Check the training and the validation data."""
        _check_once(runner, runner.train_dataloader.dataset, "training data")
        if runner.val_loop is not None:
            _check_once(runner, runner.val_dataloader.dataset, "validation data")

    def before_test(self, runner: Any) -> None:
        """Check the test data."""
        _check_once(runner, runner.test_dataloader.dataset, "test data")


def check_dataset(dataset: Any, name: str) -> None:
    """Compare every record of a dataset of MMDetection or MMSegmentation with its files.

    Args:
        dataset: the dataset, wrapped as it may be. Images behind an address (``s3://``, …) are not looked at.
        name: what to call it.

    Raises:
        ValueError: naming the first files that are missing, unreadable, or of another size, or the annotation file
            and what is wrong with it.
    """
    parts = list(_unwrapped(dataset))
    for part in parts:
        if type(part).__name__ == "CocoDataset":
            defect = problem_of_coco(part.ann_file, part.metainfo.get("classes"))
            if defect is not None:
                raise ValueError(f"{name}: {defect}")
    places = [(part, i) for part in parts if _reads_pictures(part) for i in range(len(part))]
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
    classes = metainfo.get("classes")
    if not classes or "thing_classes" in metainfo:
        return
    for place, module in model.named_modules():
        given = getattr(module, "num_classes", None)
        if not isinstance(given, int) or "rpn_head" in place or "backbone." in place:  # these know no classes
            continue
        if given != len(classes):
            shown = ", ".join(map(str, classes[:3])) + (", …" if len(classes) > 3 else "")
            raise ValueError(
                f"{name}: {len(classes)} classes ({shown}), model.{place}.num_classes is {given}: expected the same "
                "number; metainfo.classes of the dataset names those of the data"
            )


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
            raise ValueError(
                f"{labels} has the class {int(unknown[0])} (after reduce_zero_label, if that is set): "
                f"expected 0 to {len(self._classes or ()) - 1}, or {self._ignore_index} for none"
            )


def _check_once(runner: Any, dataset: Any, name: str) -> None:
    outcome: list[str | None] = [None]
    if is_main_process():
        try:
            check_classes(runner.model, getattr(dataset, "metainfo", {}), name)
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


def _reads_pictures(dataset: Any) -> bool:
    """Whether records are loaded as pictures, as far as can be seen: others may be in formats that Pillow lacks."""
    transforms = getattr(getattr(dataset, "pipeline", None), "transforms", None)
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
