"""Draw a small dataset in the formats of COCO and ADE20K: shapes over photographs, with exact boxes and masks.

Images have odd sizes and one to four shapes of three classes (disk, square, triangle), rotated, of several sizes, some
occluded, over photographs of scikit-image. Nine of ten shapes have a hue from their class's third of the colour
circle. Held-out images have other photographs than training images.
``python draw.py OUT`` writes::

    OUT/annotations/instances_{train,val}2017.json, OUT/{train,val}2017/*.jpg            COCO
    OUT/images/{training,validation}/*.jpg, OUT/annotations/{training,validation}/*.png  ADE20K

In label images 0 is unlabelled, as in ADE20K (here the outermost pixels), 1 is the photograph, and shapes follow.
"""

from __future__ import annotations

import argparse
import colorsys
import json
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from PIL import Image
from pycocotools import mask as coco_mask

CLASSES = ("disk", "square", "triangle")
PHOTOGRAPHS = {
    "train": ("astronaut", "coffee", "rocket", "immunohistochemistry", "retina", "brick"),
    "val": ("chelsea", "camera", "gravel"),
}
SIZES = (97, 161)
"""Sides of an image in pixels: odd numbers from the first to the second."""

RADII = (16, 36)
"""Half the extent of a shape in pixels."""

OWN_HUE = 0.9
"""Share of the shapes with a hue from their class's third of the circle."""

VISIBLE = 0.4
"""Smallest visible share of a shape; one that later shapes occlude more is drawn again somewhere else."""


def inside(kind: str, radius: float, angle: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a mask of the positions, relative to the centre of a shape, that are inside of it."""
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    if kind == "disk":
        return u**2 + v**2 <= radius**2
    if kind == "square":
        return np.maximum(abs(u), abs(v)) <= radius * 0.8
    edges = [np.pi / 2 + i * 2 * np.pi / 3 for i in range(3)]  # their normals
    return np.all([u * np.cos(a) + v * np.sin(a) <= radius * 0.55 for a in edges], axis=0)


def photograph(name: str, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of a photograph, [height, width, 3], uint8."""
    picture = getattr(skimage.data, name)()
    if picture.ndim == 2:
        picture = np.stack([picture] * 3, -1)
    top, left = rng.integers(picture.shape[0] - height), rng.integers(picture.shape[1] - width)
    return picture[top : top + height, left : left + width].copy()


def draw(photo: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """An image with shapes on it, and the class and the visible mask of each."""
    height, width = photo.shape[:2]
    y, x = np.mgrid[:height, :width]
    shapes: list[tuple[int, np.ndarray]] = []
    wanted = rng.integers(1, 5)
    for _ in range(20):
        if len(shapes) == wanted:
            break
        label = int(rng.integers(len(CLASSES)))
        radius = rng.uniform(*RADII)
        centre = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        mask = inside(CLASSES[label], radius, rng.uniform(0, 2 * np.pi), x - centre[0], y - centre[1])
        left = [(m & ~mask).sum() / m.sum() for _, m in shapes]
        if any(part < VISIBLE for part in left):
            continue
        shapes = [(k, m & ~mask) for k, m in shapes] + [(label, mask)]
        shade = rng.normal(0, 8, photo.shape)
        photo[mask] = np.clip(colour_of(label, rng) + shade[mask], 0, 255)
    return photo, shapes


def colour_of(label: int, rng: np.random.Generator) -> np.ndarray:
    """A vivid colour, [3], 0 to 255."""
    hue = (label + rng.uniform()) / len(CLASSES) if rng.uniform() < OWN_HUE else rng.uniform()
    return 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.6, 1), rng.uniform(0.5, 1)))


def annotation(identity: int, image: int, label: int, mask: np.ndarray) -> dict[str, Any]:
    """A shape in COCO's format."""
    run_lengths = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    ys, xs = np.nonzero(mask)
    return {
        "id": identity,
        "image_id": image,
        "category_id": label + 1,
        "bbox": [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": run_lengths["size"], "counts": run_lengths["counts"].decode()},
    }


def draw_split(out: Path, split: str, count: int, seed: int) -> None:
    """Draw one split, in both formats."""
    rng = np.random.default_rng(seed)
    record: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    ade = {"train": "training", "val": "validation"}[split]
    folders = [out / f"{split}2017", out / "images" / ade, out / "annotations" / ade]
    for folder in folders:
        folder.mkdir(parents=True)
    for i in range(1, count + 1):
        width, height = (int(side) for side in rng.integers(SIZES[0] // 2, SIZES[1] // 2 + 1, 2) * 2 + 1)
        photo = photograph(str(rng.choice(PHOTOGRAPHS[split])), width, height, rng)
        image, shapes = draw(photo, rng)
        labels = np.ones((height, width), dtype=np.uint8)
        for label, mask in shapes:
            labels[mask] = label + 2
            record["annotations"].append(annotation(len(record["annotations"]) + 1, i, label, mask))
        labels[[0, -1]] = labels[:, [0, -1]] = 0
        name = f"{i:06}"
        record["images"].append({"id": i, "file_name": f"{name}.jpg", "width": width, "height": height})
        for folder in folders[:2]:
            Image.fromarray(image).save(folder / f"{name}.jpg", quality=95)
        Image.fromarray(labels).save(folders[2] / f"{name}.png")
    (out / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(record))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder, new or empty")
    parser.add_argument("--train", type=int, default=200, help="images to train on (default 200)")
    parser.add_argument("--val", type=int, default=40, help="images held out (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw_split(options.out, "train", options.train, options.seed)
    draw_split(options.out, "val", options.val, options.seed + 1)


if __name__ == "__main__":
    main()
