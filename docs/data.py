"""Make what the pages assume of a reader from scikit-learn's data: images, a photograph, a run.

python docs/data.py images FOLDER      an ImageNet-layout folder: three classes of 10 images, and 4 held out of each
python docs/data.py scans FOLDER       one to learn from: ten classes of 100 images, and 40 held out of each
python docs/data.py photograph FILE    a photograph of 640×427 pixels
python docs/data.py run FOLDER         what a run leaves, with weights of HAT-Net-Small that are random, and the same
                                       every time
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from hatnet_core import create_model, save_checkpoint

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def images(folder: Path) -> None:
    """Enough to read and to pack."""
    write(folder, CLASSES[:3], {"train": (0, 10), "val": (10, 14)})


def scans(folder: Path) -> None:
    """Enough to learn from in a minute."""
    write(folder, CLASSES, {"train": (0, 100), "val": (100, 140)})


def write(folder: Path, classes: list[str], splits: dict[str, tuple[int, int]]) -> None:
    """Write scans of digits, enlarged to 64×64 pixels, by class; ``splits`` says which scans of each."""
    digits = load_digits()
    for digit, name in enumerate(classes):
        scans = digits.images[digits.target == digit]
        for split, (first, end) in splits.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i, scan in enumerate(scans[first:end]):
                Image.fromarray((scan * 15).astype("uint8")).resize((64, 64)).save(place / f"{i}.png")


def photograph(file: Path) -> None:
    """Write the temple that scikit-learn ships."""
    Image.fromarray(load_sample_image("china.jpg")).save(file)


def run(folder: Path) -> None:
    """Write a folder with ``model.safetensors``."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    save_checkpoint(create_model("hatnet_small"), folder / "model.safetensors")


MADE: dict[str, Callable[[Path], None]] = {"images": images, "scans": scans, "photograph": photograph, "run": run}

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in MADE:
        sys.exit(f"usage: {Path(__file__).name} {'|'.join(MADE)} PATH, got {sys.argv[1:]}")
    MADE[sys.argv[1]](Path(sys.argv[2]))
