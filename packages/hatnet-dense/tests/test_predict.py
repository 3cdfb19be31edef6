"""Image files to predict: which are found, where their results are, and what a bad one costs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SHAPES
from hatnet_dense.config import load_config
from hatnet_dense.flops import build_model
from hatnet_dense_cli import main


@pytest.fixture(scope="module")
def checkpoint_of(shapes, tmp_path_factory):
    """Random weights for a config, as a file."""
    folder = tmp_path_factory.mktemp("weights")

    def write(head, **meta):
        torch.manual_seed(0)
        path = folder / f"{head}.pth"
        model = build_model(load_config(SHAPES / f"{head}.py"))
        torch.save({"state_dict": model.state_dict(), "meta": {"dataset_meta": meta}}, path)
        return path

    return write


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def picture(path, width=64, height=48):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def predict(head, checkpoint, image, out, *more):
    return main(["predict", str(SHAPES / f"{head}.py"), str(checkpoint), str(image), "--out", str(out), *more])


def error(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("head", ["retinanet", "semfpn"])
def test_bad_images_are_named_and_all_others_are_predicted(head, checkpoint_of, folder, capsys):
    picture(folder / "a.png")
    thin = picture(folder / "b.png", width=400, height=1)
    torn = picture(folder / "c.tif")
    torn.write_bytes(torn.read_bytes()[:400])
    (folder / "d.jpg").write_text("<html>")
    picture(folder / "e.png")
    out = folder.parent / "new" / "out"
    assert predict(head, checkpoint_of(head), folder, out) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "3 of 5 images" in lines[-1]
    for path in (thin, torn, folder / "d.jpg"):
        assert any(line.startswith(f"{path}: ") for line in lines)
    labels = [] if head == "retinanet" else ["labels/a.png", "labels/e.png"]
    assert files_in(out) == ["a.png", "e.png", *labels, "predictions.json"]
    record = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in record["images"]] == ["a.png", "e.png"]


def test_a_single_bad_image_leaves_nothing(checkpoint_of, folder, capsys):
    path = picture(folder / "a.ico")
    assert predict("retinanet", checkpoint_of("retinanet"), path, folder.parent / "out") == 1
    assert str(path) in error(capsys)
    assert [path.name for path in folder.parent.iterdir()] == ["images"]


def test_folders_are_searched_with_all_below_them_and_results_keep_their_places(checkpoint_of, folder):
    for name in ("x/a.png", "y/a.png", "y/a.JPG", ".ipynb_checkpoints/a.png", "y/._a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        picture(folder / name.replace("JPG", "jpg")).rename(folder / name)
    out = folder.parent / "out"
    assert predict("semfpn", checkpoint_of("semfpn"), folder, out) == 0
    results = ["x/a.png", "y/a.JPG.png", "y/a.png.png"]
    assert files_in(out) == sorted([*(f"labels/{name}" for name in results), *results, "predictions.json"])
    record = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in record["images"]] == ["x/a.png", "y/a.JPG", "y/a.png"]
    assert [image["labels"] for image in record["images"]] == [f"labels/{name}" for name in results]


@pytest.mark.parametrize("names", [("x/a.png", "y/a.png"), ("a.png", "labels/a.png")])
def test_images_whose_results_would_overwrite_each_other_are_refused(names, shapes, folder, capsys):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        picture(folder / name)
    given = [folder] if "a.png" in names else [folder / "x", folder / "y"]
    command = ["predict", str(SHAPES / "semfpn.py"), "absent.pth", *map(str, given)]
    assert main([*command, "--out", str(folder.parent / "out")]) == 1
    assert "a.png" in error(capsys)


@pytest.mark.parametrize("place", [".", "labels", "below"])
def test_results_do_not_overwrite_their_images(place, shapes, tmp_path, capsys):
    out = tmp_path / "out"
    (out / place).mkdir(parents=True, exist_ok=True)
    path = picture(out / place / "a.png")
    before = path.read_bytes()
    (tmp_path / "link.png").symlink_to(path)
    for image in (path, tmp_path / "link.png"):
        assert predict("semfpn", "absent.pth", image, out) == 1
        assert f"{out} contains images to predict" in error(capsys)
    assert path.read_bytes() == before


@pytest.mark.parametrize("device", ["meta", "tpu:0", "", "cuda:x"])
def test_a_device_that_computes_nothing_is_refused(device, checkpoint_of, folder, capsys):
    out = folder.parent / "out"
    assert predict("retinanet", checkpoint_of("retinanet"), picture(folder / "a.png"), out, "--device", device) == 1
    assert f"device must be auto, cpu, or a GPU that is there such as cuda:0, got {device!r}" in error(capsys)
    assert not out.exists()


def test_a_config_without_test_data_names_what_it_lacks(shapes, folder, capsys):
    option = ["--cfg-options", "test_dataloader=None"]
    assert predict("retinanet", "absent.pth", picture(folder / "a.png"), folder.parent / "out", *option) == 1
    assert error(capsys).endswith("the config has no test_dataloader, which predict needs")


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"classes": ("a", "b")}, ": 2 classes (a, b), model.bbox_head.num_classes is 3: expected the same number"),
        ({"classes": ("a", "b", "c"), "palette": [[1, 2, 3]]}, ": 3 classes with 1 colours: expected one for each"),
    ],
)
def test_a_checkpoint_of_other_classes_than_its_model_is_refused(meta, message, checkpoint_of, folder, capsys):
    checkpoint = checkpoint_of("retinanet", **meta)
    assert predict("retinanet", checkpoint, picture(folder / "a.png"), folder.parent / "out") == 1
    assert f"{checkpoint}{message}" in error(capsys)


def test_a_wrapped_dataset_predicts_as_the_one_inside(checkpoint_of, folder, tmp_path):
    text = f"_base_ = {str(SHAPES / 'semfpn.py')!r}\n"
    text += "test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', "
    text += "datasets=[{{_base_.test_dataloader.dataset}}]))\n"
    (tmp_path / "wrapped.py").write_text(text)
    picture(folder / "a.png")
    checkpoint = str(checkpoint_of("semfpn"))
    for config in (SHAPES / "semfpn.py", tmp_path / "wrapped.py"):
        assert main(["predict", str(config), checkpoint, str(folder), "--out", str(tmp_path / config.stem)]) == 0
    files = sorted(
        path.relative_to(tmp_path / "semfpn") for path in (tmp_path / "semfpn").rglob("*") if path.is_file()
    )
    assert files == [Path("a.png"), Path("labels/a.png"), Path("predictions.json")]
    for path in files:
        assert (tmp_path / "semfpn" / path).read_bytes() == (tmp_path / "wrapped" / path).read_bytes()
