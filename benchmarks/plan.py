"""Requirements of 8 to 1,024 GPUs: batch, learning rate, time, all-reduce, storage, processors. Prints Markdown.

Everything follows from a few figures of one device, given on the command line: no figure of a GPU is built in.
"""

from __future__ import annotations

import argparse
import math

import torch

from hatnet_core import create_model
from hatnet_train import build_config
from hatnet_train.data.source import SYNTHETIC_TRAINING as IMAGES

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="hatnet_small", help="default hatnet_small")
    parser.add_argument("--images-per-second", type=float, required=True, help="training, of one GPU")
    parser.add_argument("--bandwidth", type=float, required=True, help="bus bandwidth of an all-reduce in GB/s")
    parser.add_argument("--kilobytes", type=float, required=True, help="of an image on the storage")
    parser.add_argument("--decoded", type=float, required=True, help="images per second that a core prepares")
    parser.add_argument("--largest-batch", type=int, default=4096, help="images per step at most (default 4096)")
    given = parser.parse_args()
    with torch.device("meta"):
        gradients = 4 * sum(p.numel() for p in create_model(given.variant).parameters())
    print(f"{given.variant}: gradients of {gradients / 1e6:.1f} MB\n")
    head = ("GPUs", "images a GPU", "batch", "peak rate", "steps an epoch", "300 epochs", "step", "all-reduce")
    columns = (*head, "share", "images/s", "GB/s from storage", "cores a GPU")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for gpus in GPUS:
        print("| " + " | ".join(row(gpus, given, gradients)) + " |")


def row(gpus: int, given: argparse.Namespace, gradients: int) -> list[str]:
    """One line of the table, as text.

    The all-reduce takes 2 (n - 1) / n · bytes / bandwidth, in a ring; it is not counted as overlapping with the
    backward pass, so that the time of a run is an upper bound.
    """
    each = min(128, given.largest_batch // gpus)
    config = build_config("imagenet", {"data": "synthetic", "batch_size": gpus * each})
    steps = IMAGES // config.optimisation.batch_size
    compute = each / given.images_per_second
    reduce = 2 * (gpus - 1) / gpus * gradients / (given.bandwidth * 1e9)
    rate = config.optimisation.batch_size / (compute + reduce)
    return [
        str(gpus),
        str(each),
        str(config.optimisation.batch_size),
        f"{config.peak_lr:.0e}",
        str(steps),
        f"{config.optimisation.epochs * steps * (compute + reduce) / 3600:.1f} h",
        f"{1e3 * compute:.1f} ms",
        f"{1e3 * reduce:.2f} ms",
        f"{100 * reduce / (compute + reduce):.0f} %",
        f"{rate:.0f}",
        f"{rate * given.kilobytes / 1e6:.2f}",
        str(math.ceil(rate / gpus / given.decoded)),
    ]


if __name__ == "__main__":
    main()
