"""Predict image files: pictures for people, JSON and label images for programs.

A detector writes ``predictions.json`` in COCO's format, and a picture of boxes and masks for each image. Categories
and images have ids from 1, in the order of the config's classes and of the files. A segmenter writes for each image
an overlay and a label image in ``labels/``, an indexed PNG whose values are the classes and whose palette is that of
the dataset; its ``predictions.json`` maps values to classes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from PIL import Image
from tqdm import tqdm

from hatnet_core.devices import pick_device
from hatnet_core.images import IMAGE_SUFFIXES, is_image_file
from hatnet_core.io import atomic_write
from hatnet_dense.config import demand, innermost
from hatnet_dense.data_check import check_classes
from hatnet_dense.errors import cut, said
from hatnet_dense.flops import build_model
from hatnet_dense.plain_checkpoint import check_weights, read_checkpoint

MAX_CLASSES = 256
"""Number of values of an indexed PNG."""

OPACITY = 0.6
"""Opacity of the classes in the overlay of a segmenter."""


def predict(
    config: Config,
    checkpoint: Path,
    images: Sequence[Path],
    out: Path,
    score_threshold: float = 0.3,
    device: str = "auto",
    on_bad: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Predict images, and write the results to a folder.

    Args:
        config: from :func:`hatnet_dense.config.load_config`; changed in place.
        checkpoint: a checkpoint file of MMEngine.
        images: files and folders, which are searched recursively.
        out: folder for the results, created if missing; it must not contain an image to predict.
        score_threshold: lowest score of the boxes in the pictures; the JSON has all boxes.
        device: see :func:`hatnet_core.devices.pick_device`.
        on_bad: called with the reason for each image that cannot be read or predicted, which is skipped; by default
            the reason is raised.

    Returns:
        The content of ``predictions.json``, which is written unless it has no images.

    Raises:
        FileNotFoundError: if the checkpoint is missing. Nothing is written.
        ValueError: if two images have the same name, the device is missing, or the checkpoint is of another model;
            nothing is written. Without ``on_bad``, if an image cannot be read or predicted; earlier results remain.
    """
    if not 0 <= score_threshold <= 1:
        raise ValueError(f"score_threshold must be from 0 to 1, got {score_threshold}")
    demand(config, "predict", "test_dataloader.dataset")
    files = _files(images, out)
    model = load_model(config, checkpoint, device)
    results = _Detections(model, score_threshold) if config.default_scope == "mmdet" else _Labels(model)
    try:
        for file in tqdm(files, desc="predicting", unit="image", delay=2, disable=None):
            try:
                with _all_or_nothing(out) as place:
                    results.add(file, _read(file.path), place)
            except (ValueError, RuntimeError, cv2.error) as error:  # RuntimeError: an image thinner than a layer
                reason = f"{file.path}: prediction failed ({cut(said(error))})"
                if on_bad is None:
                    raise ValueError(reason) from error
                on_bad(reason)
    finally:  # after Ctrl-C, too
        if results.record["images"]:
            with atomic_write(out / "predictions.json") as part:
                part.write_text(json.dumps(results.record, indent=1) + "\n")
    return results.record


@contextlib.contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files are moved to ``out`` at the end and dropped on an error."""
    nearest = next(place for place in (out, *out.absolute().parents) if place.exists())
    with tempfile.TemporaryDirectory(prefix=".hatnet-", dir=nearest) as name:
        yield Path(name)
        for path in sorted(path for path in Path(name).rglob("*") if path.is_file()):
            target = out / path.relative_to(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


@dataclass(frozen=True)
class _File:
    """An image to predict."""

    path: Path
    """Path of the image."""

    name: str
    """Path relative to the folder that was searched, with suffix."""

    stem: str
    """Path of its results relative to their folder, without suffix."""


def load_model(config: Config, checkpoint: Path, device: str = "auto") -> Any:
    """Build the model of a config with the weights of a checkpoint, for the libraries' inference functions.

    Raises:
        FileNotFoundError: if the checkpoint is missing.
        ValueError: if it cannot be read or is of another model, or the device is missing.
    """
    content = read_checkpoint(checkpoint)
    model = build_model(config)
    check_weights(model.state_dict(), content["state_dict"], strict=True)
    model.load_state_dict({name.removeprefix("module."): value for name, value in content["state_dict"].items()})
    dataset = innermost(config.test_dataloader.dataset)
    config.test_pipeline = copy.deepcopy(dataset.pipeline)  # read by the libraries' inference functions
    registry = import_module(f"{config.default_scope}.registry").DATASETS
    known = registry.build({**dataset, "lazy_init": True}).metainfo
    given = content.get("meta", {}).get("dataset_meta", {})
    model.dataset_meta = {"palette": "random", **known, **given}
    check_classes(model, model.dataset_meta, f"{checkpoint if given else 'test data'}")
    classes, palette = model.dataset_meta["classes"], model.dataset_meta["palette"]
    if not isinstance(palette, str) and len(palette) < len(classes):
        raise ValueError(f"{checkpoint}: palette must have {len(classes)} colours, one per class, got {len(palette)}")
    model.cfg = config
    return model.to(pick_device(device))


class _Detections:
    """Boxes, and masks of a model that predicts them, in COCO's format."""

    def __init__(self, model: Any, score_threshold: float) -> None:
        self._model = model
        self._threshold = score_threshold
        self._infer = import_module("mmdet.apis").inference_detector
        self._encode = import_module("mmdet.structures.mask").encode_mask_results
        self._area = import_module("pycocotools.mask").area
        self._visualizer = import_module("mmdet.visualization").DetLocalVisualizer()
        self._visualizer.dataset_meta = model.dataset_meta
        names = model.dataset_meta["classes"]
        self.record: dict[str, Any] = {
            "images": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, 1)],
            "annotations": [],
        }

    def add(self, file: _File, image: np.ndarray[Any, Any], out: Path) -> None:
        sample = self._infer(self._model, image)
        self._visualizer.add_datasample(
            file.name,
            image[..., ::-1],
            sample,
            draw_gt=False,
            pred_score_thr=self._threshold,
            out_file=str(out / f"{file.stem}.png"),
        )
        image_id = len(self.record["images"]) + 1
        height, width = image.shape[:2]
        self.record["images"].append({"id": image_id, "file_name": file.name, "height": height, "width": width})
        found = sample.pred_instances.cpu()
        masks = self._encode(found.masks.numpy()) if "masks" in found else []
        for i in range(len(found)):
            x1, y1, x2, y2 = found.bboxes[i].tolist()
            annotation = {
                "id": len(self.record["annotations"]) + 1,
                "image_id": image_id,
                "category_id": int(found.labels[i]) + 1,
                "score": float(found.scores[i]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            if masks:
                annotation["segmentation"] = {"size": [height, width], "counts": masks[i]["counts"].decode()}
                annotation["area"] = int(self._area(masks[i]))
            self.record["annotations"].append(annotation)


class _Labels:
    """Label images and overlays in the colours of the dataset."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._infer = import_module("mmseg.apis").inference_model
        meta = model.dataset_meta
        if len(meta["palette"]) != len(meta["classes"]):
            raise ValueError(
                f"palette must have {len(meta['classes'])} colours, one per class, got {len(meta['palette'])}"
            )
        self._palette = np.array(meta["palette"], dtype=np.uint8)
        if len(meta["classes"]) > MAX_CLASSES:
            raise ValueError(f"a label image must have at most {MAX_CLASSES} classes, got {len(meta['classes'])}")
        classes = [
            {"value": i, "name": name, "color": color}
            for i, (name, color) in enumerate(zip(meta["classes"], self._palette.tolist(), strict=True))
        ]
        self.record: dict[str, Any] = {"classes": classes, "images": []}

    def add(self, file: _File, image: np.ndarray[Any, Any], out: Path) -> None:
        labels = self._infer(self._model, image).pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)
        picture = Image.fromarray(labels, mode="P")
        picture.putpalette(self._palette.tobytes())
        overlay = (1 - OPACITY) * image[..., ::-1] + OPACITY * self._palette[labels]
        for place, drawn in ((out / "labels", picture), (out, Image.fromarray(overlay.astype(np.uint8)))):
            path = place / f"{file.stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.save(path)
        values, counts = np.unique(labels, return_counts=True)
        self.record["images"].append(
            {
                "file_name": file.name,
                "labels": f"labels/{file.stem}.png",
                "height": labels.shape[0],
                "width": labels.shape[1],
                "pixels": {str(value): int(n) for value, n in zip(values, counts, strict=True)},
            }
        )


def _files(images: Sequence[Path], out: Path) -> list[_File]:
    """List the images of files and folders; results keep the suffix of their image where stems are equal."""
    found: list[tuple[Path, Path]] = []
    for path in images:
        inside = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
        names = [name for name in inside if is_image_file(name)]
        if path.is_dir() and not names:
            raise ValueError(f"{path}: no files that end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        found += [(path / name, name) for name in names] if path.is_dir() else [(path, Path(path.name))]
    places = out.resolve()
    if any(place.is_relative_to(places) for path, _ in found for place in (path.resolve(), path.parent.resolve())):
        raise ValueError(f"--out must be a folder without images to predict, got {out}")
    stems = Counter(name.with_suffix("") for _, name in found)
    files = [
        _File(path, name.as_posix(), (name if stems[name.with_suffix("")] > 1 else name.with_suffix("")).as_posix())
        for path, name in found
    ]
    written = Counter(place for file in files for place in (file.stem, f"labels/{file.stem}"))
    twice = next((file for file in files if written[file.stem] > 1), None)
    if twice is not None:
        raise ValueError(f"{twice.path}: another image has the same result file, {twice.stem}.png")
    return files


def _read(file: Path) -> np.ndarray[Any, Any]:
    """Read an image as the libraries do, [height, width, 3] in the order BGR."""
    if file.is_file() and not file.stat().st_size:
        raise ValueError("the file is empty")
    try:
        image = mmcv.imread(str(file), channel_order="bgr")
    except Exception as error:  # OpenCV may raise anything on a broken file
        raise ValueError(cut(said(error))) from error
    if image is None:
        raise ValueError("OpenCV cannot read it")
    return np.asarray(image)
