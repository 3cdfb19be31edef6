"""The main job end to end: train a HAT-Net on scikit-learn's digits under DeepSpeed, then classify held-out scans.

One process a GPU (1, 2, 4 or 8 of them), or two on a machine without one. Ends non-zero if the held-out top-1 is
below 97 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from hatnet_train.data.source import Digits

TARGET = 97.0
MARKER = ".digits_demo"
"""A file that says that the folder is an earlier demo's and may be replaced."""

BIN = Path(sys.executable).parent


def main() -> int:
    """Train, predict, draw, and print what was made; 0 if the target was reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder, replaced if an earlier demo's")
    out: Path = parser.parse_args().out
    if (out / MARKER).is_file():
        shutil.rmtree(out)
    elif out.exists():
        parser.error(f"{out} is there and no earlier demo made it; expected a new folder for --out")
    out.mkdir(parents=True)
    (out / MARKER).touch()
    start = time.perf_counter()
    processes = max(n for n in (1, 2, 4, 8) if n <= (torch.cuda.device_count() or 2))  # shares of the batch of 32
    print(f"training on {processes} {'GPU' if torch.cuda.is_available() else 'CPU'} process(es) ...", flush=True)
    launch = [BIN / "deepspeed", "--num_accelerators", str(processes), "--master_port", free_port()]
    train = ["--module", "hatnet_train", "--recipe", "digits", "--out", out / "run"]
    if failed := subprocess.run([*launch, *train], check=False).returncode:
        print(f"the training ended with status {failed}; its messages are above", file=sys.stderr)
        return failed
    seconds = time.perf_counter() - start

    scans = write_scans(out / "held_out")
    predictions = classify(out / "run" / "model.safetensors", list(scans))
    draw(predictions, scans, out / "predictions.png")
    report(out, seconds, predictions, scans)
    if last_metrics(out)["top1"] >= TARGET:
        return 0
    print(f"\nthe held-out top-1 is below {TARGET} %", file=sys.stderr)
    return 1


def free_port() -> str:
    """Return a port of this machine that nothing listens on, so that two launches do not meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def write_scans(folder: Path) -> dict[Path, str]:
    """Write the first two held-out scans of every digit as PNG files; their labels by path."""
    folder.mkdir(parents=True, exist_ok=True)
    data = Digits(train=False)
    labels = data.labels.tolist()
    scans = {}
    for digit in range(10):
        for i in [i for i, label in enumerate(labels) if label == digit][:2]:
            path = folder / f"{digit}_{i:03d}.png"
            Image.fromarray(data.scans[i]).save(path)
            scans[path] = str(digit)
    return scans


def classify(checkpoint: Path, images: list[Path]) -> list[dict]:
    """Return what ``hatnet-predict --format json`` prints for the images."""
    command = [BIN / "hatnet-predict", "--checkpoint", checkpoint, "--format", "json", *images]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def draw(predictions: list[dict], scans: dict[Path, str], path: Path) -> None:
    """Draw every scan under its predicted class and probability, wrong ones in red."""
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    for axes, row, (scan, label) in zip(figure.subplots(2, 10).T.flat, predictions, scans.items(), strict=True):
        axes.imshow(Image.open(scan), cmap="gray_r")
        color = "black" if row["classes"][0] == label else "red"
        axes.set_title(f"{row['classes'][0]} ({100 * row['probabilities'][0]:.0f} %)", fontsize=9, color=color)
        axes.axis("off")
    figure.savefig(path, dpi=130)


def last_metrics(out: Path) -> dict:
    """Return the last epoch's row of metrics.jsonl."""
    return json.loads((out / "run" / "metrics.jsonl").read_text().splitlines()[-1])


def report(out: Path, seconds: float, predictions: list[dict], scans: dict[Path, str]) -> None:
    """Print the result and a table of the files."""
    metrics = last_metrics(out)
    right = sum(row["classes"][0] == label for row, label in zip(predictions, scans.values(), strict=True))
    print(f"\nheld-out top-1 {metrics['top1']:.2f} % after {metrics['epoch']} epochs, {seconds:.0f} s with start-up")
    print(f"hatnet-predict named {right} of {len(scans)} held-out scans correctly\n")
    made = {
        "run/model.safetensors": "final weights, for hatnet_core.load_checkpoint",
        "run/metrics.jsonl": "losses and accuracy, one line an epoch",
        "run/curves.png": "the same as a picture",
        "run/tensorboard": "the same for TensorBoard",
        "run/checkpoints": "what hatnet-train --resume auto resumes",
        "run/config.json": "configuration, versions, command",
        "held_out": "held-out scans as PNG files",
        "predictions.png": "the scans with their predicted classes",
    }
    for name, what in made.items():
        print(f"{out / name!s:<{len(str(out)) + 24}}{what}")


if __name__ == "__main__":
    sys.exit(main())
