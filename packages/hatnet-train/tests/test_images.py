import io

import numpy as np
import pytest
import torch
from PIL import Image

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


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "L"), ("GIF", "P"), ("BMP", "RGB"), ("PPM", "RGB")]
)
def test_other_formats_are_decoded_without_loss_as_rgb(kind, mode):
    image = photograph(mode)
    assert torch.equal(decode(encoded(image, kind), "x"), to_tensor(image))


def test_a_png_under_a_jpeg_name_is_read(tmp_path):
    photograph().save(tmp_path / "n02105855_2933.JPEG", "PNG")
    assert torch.equal(read_image(tmp_path / "n02105855_2933.JPEG"), to_tensor(photograph()))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png")
    assert image.shape == (3, 64, 64)
    assert torch.equal(image[0], torch.from_numpy((values >> 8).astype(np.uint8)))


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
    with pytest.raises(ValueError, match=r"cannot read .*image\.jpg as an image: "):
        read_image(tmp_path / "image.jpg")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image at .*nowhere\.png: expected an existing file"):
        read_image(tmp_path / "nowhere.png")
