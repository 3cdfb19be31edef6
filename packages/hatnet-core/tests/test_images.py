"""Images of every mode are decoded to the pixels that are written down here."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from hatnet_core.images import is_image_file, to_rgb
from hatnet_testing import raises

BLACK, GREY, WHITE, RED = (0, 0, 0), (128, 128, 128), (255, 255, 255), (255, 0, 0)
ORIENTATION = 0x0112


def image_of(mode, *pixels):
    """A picture of one row."""
    image = Image.new(mode, (len(pixels), 1))
    for i, pixel in enumerate(pixels):
        image.putpixel((i, 0), pixel)
    return image


def palette(mode, *pixels):
    image = image_of(mode, *pixels)
    image.putpalette([*BLACK, *RED])
    return image


def saved(image, kind, **options):
    """A picture opened from a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(buffer)


MODES = {
    "1": (image_of("1", 0, 255), [BLACK, WHITE]),
    "L": (image_of("L", 0, 128, 255), [BLACK, GREY, WHITE]),
    "L with a transparent grey": (saved(image_of("L", 0, 128), "PNG", transparency=0), [WHITE, GREY]),
    "P": (palette("P", 0, 1), [BLACK, RED]),
    "P with a transparent colour": (saved(palette("P", 0, 1), "PNG", transparency=0), [WHITE, RED]),
    "P with an alpha of each colour": (
        saved(palette("P", 0, 1), "PNG", transparency=bytes([127, 255])),
        [GREY, RED],
    ),
    "LA": (image_of("LA", (0, 255), (0, 0), (0, 127)), [BLACK, WHITE, GREY]),
    "PA": (palette("PA", (1, 255), (1, 0), (0, 127)), [RED, WHITE, GREY]),
    "RGBA": (image_of("RGBA", (255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 127)), [RED, WHITE, GREY]),
    "RGB": (image_of("RGB", RED, (1, 2, 3)), [RED, (1, 2, 3)]),
    "RGB with a transparent colour": (saved(image_of("RGB", RED, BLACK), "PNG", transparency=BLACK), [RED, WHITE]),
    "CMYK": (image_of("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), [RED, BLACK]),
    "YCbCr": (image_of("YCbCr", (128, 128, 128), (255, 128, 128)), [GREY, WHITE]),
    "I;16": (image_of("I;16", 0, 128, 129, 128 * 257, 65535), [BLACK, BLACK, (1, 1, 1), GREY, WHITE]),
    "I;16B": (image_of("I;16B", 0, 128 * 257, 65535), [BLACK, GREY, WHITE]),
    "I of 16 bits": (image_of("I", 0, 128 * 257, 65535), [BLACK, GREY, WHITE]),
}
"""A picture and what a viewer shows of it; 127 of black over white is (255 - 127) grey."""


@pytest.mark.parametrize("mode", MODES)
def test_a_picture_of_any_mode_becomes_what_a_viewer_shows(mode):
    image, expected = MODES[mode]
    before = image.mode, image.size
    rgb = to_rgb(image)
    assert (rgb.mode, rgb.size) == ("RGB", image.size)
    assert np.asarray(rgb)[0].tolist() == [list(pixel) for pixel in expected]
    assert (image.mode, image.size) == before


def test_every_step_of_eight_bits_comes_back_from_sixteen():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = saved(Image.fromarray(values * 257), "PNG")
    assert (np.asarray(to_rgb(image)) == values[..., None]).all()


UPRIGHT = np.arange(6, dtype=np.uint8).reshape(3, 2) * 50
AS_STORED = {
    1: UPRIGHT,
    2: np.fliplr(UPRIGHT),
    3: np.rot90(UPRIGHT, 2),
    4: np.flipud(UPRIGHT),
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),  # the camera lay on its left side: shown turned clockwise
    7: np.rot90(UPRIGHT, 2).T,
    8: np.rot90(UPRIGHT, -1),
}
"""By EXIF's orientation, what is stored of a picture that is to be shown as ``UPRIGHT``."""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_a_picture_is_turned_as_its_exif_says_and_once(kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.kron(AS_STORED[orientation], np.ones((16, 16), np.uint8))  # in JPEG's blocks
    rgb = to_rgb(saved(Image.fromarray(stored).convert("RGB"), kind, exif=exif))
    shown = np.asarray(rgb)[8::16, 8::16].astype(int)
    assert shown.shape == (3, 2, 3)
    assert np.abs(shown - UPRIGHT[..., None]).max() <= (0 if kind in ("PNG", "TIFF") else 6)
    assert (np.asarray(to_rgb(rgb)) == np.asarray(rgb)).all()


@pytest.mark.parametrize("exif", [b"garbage", b"Exif\0\0"])
def test_an_exif_that_cannot_be_read_turns_nothing(exif):
    image = saved(image_of("RGB", RED, BLACK), "PNG", exif=exif)
    assert np.asarray(to_rgb(image))[0].tolist() == [list(RED), list(BLACK)]


@pytest.mark.parametrize(("mode", "value"), [("I", 2**16), ("I", -1), ("F", 0.5)])
def test_numbers_whose_range_nothing_tells_are_refused(mode, value):
    with raises(ValueError, 32, 8, 16):
        to_rgb(image_of(mode, 0, value))


def test_a_damaged_file_is_an_error():
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(buffer, "PNG")
    with pytest.raises(OSError, match=r"truncated|broken"):
        to_rgb(Image.open(io.BytesIO(buffer.getvalue()[:300])))


def test_hatnet_core_itself_does_not_need_pillow():
    code = "import sys; sys.modules['PIL'] = None; import hatnet_core; hatnet_core.create_model('hatnet_tiny')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("path", ["cat.jpg", "cat.JPEG", "a/b/cat.jfif", "cat.gif", "cat.avif", "a.b/cat.webp"])
def test_image_files_are_recognised_by_suffix_in_any_case(path):
    assert is_image_file(path)


@pytest.mark.parametrize("path", ["cat", "cat.txt", "jpg", ".jpg", "._cat.jpg", ".ipynb_checkpoints/cat.jpg"])
def test_other_and_hidden_files_are_not_images(path):
    assert not is_image_file(path)
