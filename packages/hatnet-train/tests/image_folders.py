"""Image folders drawn for the tests of shards, and shards as the webdataset library reads them."""

import io
import shutil

import numpy as np
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

ODD = {
    "cmyk.jpg": ("CMYK", "JPEG"),
    "grey.jpeg": ("L", "JPEG"),
    "named wrongly.JPEG": ("RGB", "PNG"),
    "palette.png": ("P", "PNG"),
    "picture.bmp": ("RGB", "BMP"),
    "picture.tiff": ("RGB", "TIFF"),
    "picture.webp": ("RGB", "WEBP"),
    "transparent.png": ("RGBA", "PNG"),
}
"""Images other than plain JPEG: name, mode, format."""


def picture(seed, width, height):
    """Smooth colours with some noise: like a photograph, it survives JPEG and resizing."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-6, 7, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind="JPEG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def make_image_folder(root):
    """``train/`` and ``val/``, in each two classes of plain JPEG files and one of odd images; val/ has no bees."""
    fill(root / "train", 0)
    fill(root / "val", 100)
    shutil.rmtree(root / "val" / "bee")


def fill(folder, first):
    """Two classes of plain JPEG files, of different sizes, and one of odd images; all differ."""
    for place, name in enumerate(("ant", "bee")):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            seed = first + 10 * place + i
            picture(seed, 70 + seed, 90 - i).save(folder / name / f"{name}_{i}.JPEG")
    (folder / "odd").mkdir()
    for i, (name, (mode, kind)) in enumerate(ODD.items()):
        (folder / "odd" / name).write_bytes(encoded(picture(first + 50 + i, 80, 60).convert(mode), kind))


def read_with_webdataset(root, split):
    """The samples as the webdataset library finds them."""
    samples = []
    for path in sorted(root.glob(f"{split}-*.tar")):
        with path.open("rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))
    return samples


def image_of(sample):
    """The one file of a sample of the webdataset library that is an image."""
    (name,) = (name for name in sample if not name.startswith("__") and name != "cls")
    return sample[name]


def draw_coloured_images(root, *, classes, train, val):
    """An ImageNet-layout folder of noise, each class of another colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for place in range(classes):
            folder = root / split / f"class{place}"
            folder.mkdir(parents=True)
            colour = np.array([place & 1, place >> 1 & 1, 0]) * 120
            for i in range(count):
                pixels = rng.integers(0, 120, (40 + i, 60, 3)) + colour
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
