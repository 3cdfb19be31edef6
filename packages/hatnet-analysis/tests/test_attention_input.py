"""Image files and checkpoints as attention maps take them."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from hatnet_analysis.attention_input import read_image, read_model
from hatnet_core import create_model, save_checkpoint
from hatnet_core.images import to_rgb
from hatnet_testing import raises


def test_random_weights_are_the_same_every_time_and_take_nothing_from_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = read_model(None, "hatnet_tiny")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, _ = read_model(None, "hatnet_tiny")
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_a_checkpoint_says_which_model_it_is_and_how_images_are_normalised(tmp_path):
    torch.manual_seed(0)
    model = create_model("hatnet_tiny", num_classes=3)
    save_checkpoint(model, tmp_path / "own.safetensors", {"mean": [0.1] * 3, "std": [0.2] * 3})
    loaded, normalisation = read_model(tmp_path / "own.safetensors", None)
    assert normalisation == ([0.1] * 3, [0.2] * 3)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    torch.save(model.state_dict(), tmp_path / "foreign.pth")
    loaded, _ = read_model(tmp_path / "foreign.pth", "hatnet_tiny")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    with raises(ValueError, "foreign.pth", "variant=NAME"):
        read_model(tmp_path / "foreign.pth", None)
    with raises(FileNotFoundError, tmp_path / "absent.pth"):
        read_model(tmp_path / "absent.pth", "hatnet_tiny")
    with raises(ValueError, "--checkpoint", "--variant"):
        read_model(None, None)


def test_a_file_that_is_no_image_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no image")
    with raises(ValueError, tmp_path / "text.png"):
        read_image(tmp_path / "text.png")
    with raises(FileNotFoundError, tmp_path / "absent.png"):
        read_image(tmp_path / "absent.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with raises(ValueError, tmp_path / "cut.png"):
        read_image(tmp_path / "cut.png")
    monkeypatch.setattr("hatnet_analysis.attention_input.MAX_PIXELS", 100)
    with raises(ValueError, tmp_path / "whole.png", "40×30", 100):
        read_image(tmp_path / "whole.png")


@pytest.mark.parametrize("mode", ["1", "L", "P", "PA", "LA", "RGBA", "RGB", "CMYK", "YCbCr", "I;16"])
def test_an_image_is_read_as_all_packages_read_it(mode, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("I" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., :2].copy().view(np.uint16)[..., 0])
    exif = Image.Exif()
    exif[0x0112] = 6
    ending = {"PA": "tiff", "CMYK": "jpg", "YCbCr": "jpg"}.get(mode, "png")
    path = tmp_path / f"image.{ending}"
    image.save(path, exif=exif)
    with Image.open(path) as image:
        expected = to_rgb(image)
    assert expected.size == (30, 40)
    assert (np.asarray(read_image(path)) == np.asarray(expected)).all()


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_exif_says(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"image.{kind}", exif=exif)
    with Image.open(tmp_path / f"image.{kind}") as image:
        expected = to_rgb(image)
    read = read_image(tmp_path / f"image.{kind}")
    assert read.size == ((40, 30) if orientation < 5 else (30, 40))
    assert (np.asarray(read) == np.asarray(expected)).all()


def test_numbers_whose_range_nothing_tells_are_refused_by_name(tmp_path):
    Image.new("F", (2, 2), 0.5).save(tmp_path / "deeper.tiff")
    with raises(ValueError, tmp_path / "deeper.tiff", 32, 8):
        read_image(tmp_path / "deeper.tiff")


@pytest.mark.parametrize(
    "metadata",
    [{"mean": 0.5}, {"mean": [0.5] * 2}, {"mean": ["0.5"] * 3}, {"std": [0.2, 0, 0.2]}, {"std": None}],
)
def test_a_checkpoint_whose_images_cannot_be_normalised_is_refused(metadata, tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=0), tmp_path / "own.safetensors", metadata)
    ((name, value),) = metadata.items()
    with raises(ValueError, tmp_path / "own.safetensors", name, repr(value)):
        read_model(tmp_path / "own.safetensors", None)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [("hatnet_tiny", {"in_chans": 1}, ("in_chans", 1, 3)), ("hatnet_small_window34", {}, ("windows", "stage 3"))],
)
def test_a_checkpoint_whose_attention_is_not_drawn_is_refused(name, changes, named, tmp_path):
    save_checkpoint(create_model(name, num_classes=0, **changes), tmp_path / "own.safetensors")
    for variant in (None, name):
        with raises(ValueError, tmp_path / "own.safetensors", *named):
            read_model(tmp_path / "own.safetensors", variant)


def test_a_safetensors_file_from_elsewhere_is_read_with_the_name_of_its_model(tmp_path):
    model = create_model("hatnet_tiny", num_classes=3)
    save_file(model.state_dict(), tmp_path / "foreign.safetensors")
    loaded, _ = read_model(tmp_path / "foreign.safetensors", "hatnet_tiny")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())
    with raises(ValueError, tmp_path / "foreign.safetensors", "variant=NAME"):
        read_model(tmp_path / "foreign.safetensors", None)
