"""A folder of JPEG files that are to a loader what ImageNet's are: photographs of 500×375 pixels in class folders.

They are random crops of the photographs that come inside scikit-image, in random sizes and brightness and with the
noise of a sensor, so that their files are about as large as ImageNet's and no two are alike. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data
from tqdm import tqdm

WIDTH, HEIGHT, QUALITY = 500, 375, 90
"""Pixels and JPEG quality of the files; 500×375 is the most frequent size in ImageNet."""

SMALLEST_CROP = 0.6
"""Share of the photograph's width that a crop has at least; below it, enlarging would leave too little detail."""

NOISE = (5.0, 12.0)
"""Standard deviation of the noise, from and to, of 255."""

BRIGHTNESS = (0.8, 1.2)

SYNSETS = (
    *("n01440764", "n01514668", "n01622779", "n01770081", "n01855672", "n01978287", "n02085620", "n02099601"),
    *("n02110341", "n02123045", "n02281406", "n02391049", "n02504458", "n02701002", "n02823428", "n02979186"),
    *("n03100240", "n03344393", "n03777754", "n04146614"),
)
"""Twenty of ImageNet's class folders."""


def draw_photographs(root: Path, count: int, seed: int = 0) -> int:
    """Write ``count`` JPEG files below ``root/train`` and show progress.

    Args:
        root: a new folder, laid out like ImageNet.
        count: number of images, a multiple of the twenty classes.
        seed: of everything random.

    Returns:
        Bytes of all files together.
    """
    rng = np.random.default_rng(seed)
    sources = [Image.fromarray(photograph) for photograph in bundled()]
    size = 0
    for i in tqdm(range(count), desc="drawing photographs", unit="image"):
        synset = SYNSETS[i % len(SYNSETS)]
        path = root / "train" / synset / f"{synset}_{i}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(sources[i % len(sources)], rng).save(path, "JPEG", quality=QUALITY)
        size += path.stat().st_size
    return size


def bundled() -> list[np.ndarray]:
    """Return the colour photographs of everyday things in the package, [H, W, 3] uint8."""
    left, right, _ = data.stereo_motorcycle()
    return [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), left, right]


def photograph(source: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Cut a random part of ``source`` as a camera might have taken it, ``WIDTH`` × ``HEIGHT`` pixels."""
    width = rng.uniform(SMALLEST_CROP, 1) * min(source.width, source.height * WIDTH / HEIGHT)
    height = width * HEIGHT / WIDTH
    left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    box = (left, top, left + width, top + height)
    part = source.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(part, dtype=np.float32) * np.float32(rng.uniform(*BRIGHTNESS))
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(*NOISE))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
