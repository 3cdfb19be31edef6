"""Training from scratch on drawn shapes, to figures on images that were held out: each detector and the segmenter."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from harness import Measurement, Ratio, Table
from PIL import Image

SHAPES = Path(__file__).parents[1] / "packages" / "hatnet-dense" / "tests" / "shapes"

TARGETS = {
    "mask-rcnn": {"coco/bbox_mAP_50": 0.5, "coco/segm_mAP_50": 0.5},
    "retinanet": {"coco/bbox_mAP_50": 0.5},
    "semfpn": {"mIoU": 70.0},
}
"""What has to be reached on the held-out images, in the units of the libraries' evaluators."""

PICTURES = Path("docs/images")

SHOWN = 8
"""Held-out images in a picture."""

WHAT = """HAT-Net-Tiny from scratch, by `hatnet-dense train` with the configs in
`packages/hatnet-dense/tests/shapes`, on 200 images that `draw.py` there draws: one to four disks, squares and
triangles of any size and turn over photographs, nine of ten in a hue of their class. The figures are of 40 images
over other photographs, by the evaluators of MMDetection and MMSegmentation; `hatnet-dense test` on the saved
checkpoint has to repeat those of the training to the last digit. Seconds are of the whole command, with its start."""


def measure(_: argparse.Namespace) -> Measurement:
    """Train, test and draw all three."""
    result = Measurement("Drawn shapes", WHAT)
    seconds: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder:
        data = Path(folder) / "shapes"
        subprocess.run([sys.executable, str(SHAPES / "draw.py"), str(data)], check=True)
        os.environ["SHAPES"] = str(data)
        for head, targets in TARGETS.items():
            run = Path(folder) / head
            start = time.perf_counter()
            _command("train", head, "--work-dir", run)
            seconds[f"{head}, training"] = [time.perf_counter() - start]
            checkpoint = (run / "last_checkpoint").read_text()
            metrics_file = run / "tested.json"
            start = time.perf_counter()
            _command("test", head, checkpoint, "--work-dir", run / "test", "--out", metrics_file)
            seconds[f"{head}, test"] = [time.perf_counter() - start]
            metrics = json.loads(metrics_file.read_text())
            trained = _last_scalars(run)
            for name, target in targets.items():
                if metrics[name] != trained[name]:
                    raise RuntimeError(f"{head}: test gives {name} {metrics[name]}, training gave {trained[name]}")
                result.ratios.append(Ratio(f"{head}: {name}", [metrics[name]], at_least=target))
            images = data / "images" / "validation" if head == "semfpn" else data / "val2017"
            _command("predict", head, checkpoint, images, "--out", run / "predicted", "--score-threshold", "0.5")
            _montage(sorted((run / "predicted").glob("*[0-9].png"))[:SHOWN], PICTURES / f"dense-{head}.png")
    result.tables.append(Table("command", "s", seconds, digits=0))
    return result


def _command(name: str, head: str, *arguments: object) -> None:
    command = [sys.executable, "-m", "hatnet_dense", name, str(SHAPES / f"{head}.py"), *map(str, arguments)]
    subprocess.run(command, check=True)


def _last_scalars(run: Path) -> dict[str, float]:
    (log,) = run.glob("*/vis_data/scalars.json")
    values: dict[str, float] = json.loads(log.read_text().splitlines()[-1])
    return values


def _montage(files: list[Path], out: Path) -> None:
    """Pictures of any size in two rows, each twice as large as it is."""
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    height = max(p.shape[0] for p in pictures)
    width = max(p.shape[1] for p in pictures)
    columns = -(-len(pictures) // 2)
    sheet = np.full((2 * (height + 4), columns * (width + 4), 3), 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + 4), i % columns * (width + 4)
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    image = Image.fromarray(sheet)
    out.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * 2, image.height * 2), Image.Resampling.LANCZOS).save(out)
