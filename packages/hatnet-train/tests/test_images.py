import io

import numpy as np
import pytest
import torch
from PIL import Image

from hatnet_core.images import to_rgb
from hatnet_testing import raises
from hatnet_train.data.images import decode, read_image, to_pillow, to_tensor


def photograph(mode="RGB"):
    rows, columns = np.mgrid[0:37, 0:53]
    pixels = np.stack([rows * 6, columns * 4, (rows * columns) % 256], -1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_jpeg_is_decoded_to_pillows_pixels(mode, subsampling):
    options = {} if mode == "L" else {"subsampling": subsampling}
    file = encoded(photograph(mode), "JPEG", quality=88, **options)
    with Image.open(io.BytesIO(file)) as image:
        expected = to_tensor(image)
    difference = (decode(file, "x").int() - expected.int()).abs().max()
    assert difference <= (1 if mode == "CMYK" else 0)  # CMYK is converted by each in its own rounding


def with_alpha(mode):
    """The photograph, growing transparent from left to right; over a palette in steps of its colours."""
    image = photograph()
    image.putalpha(Image.linear_gradient("L").rotate(90).resize(image.size))
    return image.convert(mode)


def of_sixteen_bits():
    return Image.fromarray(np.linspace(0, 65535, 37 * 53).reshape(37, 53).astype(np.uint16))


FILES = {
    "1": encoded(photograph("1"), "PNG"),
    "L": encoded(photograph("L"), "PNG"),
    "L in GIF": encoded(photograph("L"), "GIF"),
    "P": encoded(photograph("P"), "PNG"),
    "P with a transparent colour": encoded(photograph("P"), "PNG", transparency=photograph("P").getpixel((9, 9))),
    "P with an alpha of each colour": encoded(photograph("P"), "PNG", transparency=bytes(range(256))),
    "LA": encoded(with_alpha("LA"), "PNG"),
    "PA": encoded(with_alpha("PA"), "TIFF"),
    "RGBA": encoded(with_alpha("RGBA"), "PNG"),
    "RGBA in WebP": encoded(with_alpha("RGBA"), "WEBP"),
    "RGB": encoded(photograph(), "PNG"),
    "RGB in BMP": encoded(photograph(), "BMP"),
    "RGB in PPM": encoded(photograph(), "PPM"),
    "CMYK": encoded(photograph("CMYK"), "TIFF"),
    "YCbCr": encoded(photograph("YCbCr"), "JPEG"),
    "I;16": encoded(of_sixteen_bits(), "PNG"),
    "I;16 in TIFF": encoded(of_sixteen_bits(), "TIFF"),
    "upright by XMP": encoded(photograph(), "JPEG", xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
}


@pytest.mark.parametrize("mode", FILES)
def test_files_of_any_mode_are_read_as_all_packages_read_them(mode):
    with Image.open(io.BytesIO(FILES[mode])) as image:
        assert torch.equal(decode(FILES[mode], "x"), to_tensor(to_rgb(image)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(kind, mode, endian, orientation):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x0112] = orientation
    file = encoded(photograph(mode), kind, exif=exif)
    with Image.open(io.BytesIO(file)) as image:
        assert image.getexif().endian == endian
        expected = to_tensor(to_rgb(image))
    assert torch.equal(decode(file, "x"), expected)
    assert tuple(expected.shape) == ((3, 37, 53) if orientation < 5 else (3, 53, 37))


def test_numbers_whose_range_nothing_tells_are_refused_by_name():
    with raises(ValueError, "depth.tiff", 32, 8, 16):
        decode(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), "depth.tiff")


def test_a_png_under_a_jpeg_name_is_read(tmp_path):
    photograph().save(tmp_path / "n02105855_2933.JPEG", "PNG")
    assert torch.equal(read_image(tmp_path / "n02105855_2933.JPEG"), to_tensor(photograph()))


def test_a_tensor_becomes_the_picture_it_came_from():
    assert torch.equal(to_tensor(to_pillow(to_tensor(photograph()))), to_tensor(photograph()))


@pytest.mark.parametrize("damage", ["text", "empty", "half a jpeg", "half a png"])
def test_what_is_no_whole_image_is_refused_by_name(damage, tmp_path):
    content = {
        "text": b"not an image",
        "empty": b"",
        "half a jpeg": encoded(photograph(), "JPEG")[:-300],
        "half a png": encoded(photograph(), "PNG")[:300],
    }[damage]
    (tmp_path / "image.jpg").write_bytes(content)
    with raises(ValueError, tmp_path / "image.jpg"):
        read_image(tmp_path / "image.jpg")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with raises(FileNotFoundError, tmp_path / "nowhere.png"):
        read_image(tmp_path / "nowhere.png")
