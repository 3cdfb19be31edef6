"""Image files to predict: which are found, where their results are, and what a bad one costs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SHAPES
from hatnet_dense.cli import main
from hatnet_dense.config import load_config
from hatnet_dense.flops import build_model
from hatnet_dense.predict import predict as predict_images
from hatnet_testing import check, error_line, raises


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


def refused(capsys, *named):
    """Check the one line that the command ends with."""
    error_line(capsys.readouterr().err, "hatnet-dense predict", *named)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("head", "mode", "status"), [("retinanet", "strict", 1), ("semfpn", "replace", 0)])
def test_bad_images_are_named_and_all_others_are_predicted(head, mode, status, checkpoint_of, folder, capsys):
    picture(folder / "a.png")
    thin = picture(folder / "b.png", width=400, height=1)
    torn = picture(folder / "c.tif")
    torn.write_bytes(torn.read_bytes()[:400])
    (folder / "d.jpg").write_text("<html>")
    picture(folder / "e.png")
    out = folder.parent / "new" / "out"
    assert predict(head, checkpoint_of(head), folder, out, "--on-bad-image", mode) == status
    prefix = f"hatnet-dense predict: {'error' if status else 'warning'}: "
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(prefix)]
    for path, line in zip((thin, torn, folder / "d.jpg"), lines, strict=False):
        check(line, path)
    assert len(lines) == 3 + status
    if status:
        check(lines[-1], 3, 5)
        assert str(folder) not in lines[-1]
    labels = [] if head == "retinanet" else ["labels/a.png", "labels/e.png"]
    assert files_in(out) == ["a.png", "e.png", *labels, "predictions.json"]
    record = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in record["images"]] == ["a.png", "e.png"]


def test_a_single_bad_image_leaves_nothing(checkpoint_of, folder, capsys):
    path, checkpoint = picture(folder / "a.ico"), checkpoint_of("retinanet")
    assert predict("retinanet", checkpoint, path, folder.parent / "out", "--on-bad-image", "replace") == 1
    warning, error = capsys.readouterr().err.splitlines()[-2:]
    check(warning, "warning", path)
    error_line(error, "hatnet-dense predict", 1)
    with raises(ValueError, path):
        predict_images(load_config(SHAPES / "retinanet.py"), checkpoint, [path], folder.parent / "out")
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
    refused(capsys, "a.png")


@pytest.mark.parametrize("place", [".", "labels", "below"])
def test_results_do_not_overwrite_their_images(place, shapes, tmp_path, capsys):
    out = tmp_path / "out"
    (out / place).mkdir(parents=True, exist_ok=True)
    path = picture(out / place / "a.png")
    before = path.read_bytes()
    (tmp_path / "link.png").symlink_to(path)
    for image in (path, tmp_path / "link.png"):
        assert predict("semfpn", "absent.pth", image, out) == 1
        refused(capsys, out)
    assert path.read_bytes() == before


def test_a_config_without_test_data_names_what_it_lacks(shapes, folder, capsys):
    option = ["--cfg-options", "test_dataloader=None"]
    assert predict("retinanet", "absent.pth", picture(folder / "a.png"), folder.parent / "out", *option) == 1
    refused(capsys, "test_dataloader")


@pytest.mark.parametrize(
    ("meta", "named"),
    [
        ({"classes": ("a", "b")}, ["a, b", 2, "model.bbox_head.num_classes", 3]),
        ({"classes": ("a", "b", "c"), "palette": [[1, 2, 3]]}, [3, 1]),
    ],
)
def test_a_checkpoint_of_other_classes_than_its_model_is_refused(meta, named, checkpoint_of, folder, capsys):
    checkpoint = checkpoint_of("retinanet", **meta)
    assert predict("retinanet", checkpoint, picture(folder / "a.png"), folder.parent / "out") == 1
    refused(capsys, checkpoint, *named)


def test_a_wrapped_dataset_predicts_as_the_one_inside(checkpoint_of, folder, tmp_path):
    text = f"_base_ = {str(SHAPES / 'semfpn.py')!r}\n"
    text += "test_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', "
    text += "datasets=[{{_base_.test_dataloader.dataset}}]))\n"
    (tmp_path / "wrapped.py").write_text(text)
    picture(folder / "a.png")
    checkpoint = str(checkpoint_of("semfpn"))
    for config in (SHAPES / "semfpn.py", tmp_path / "wrapped.py"):
        assert main(["predict", str(config), checkpoint, str(folder), "--out", str(tmp_path / config.stem)]) == 0
    assert files_in(tmp_path / "semfpn") == ["a.png", "labels/a.png", "predictions.json"]
    for path in files_in(tmp_path / "semfpn"):
        assert (tmp_path / "semfpn" / path).read_bytes() == (tmp_path / "wrapped" / path).read_bytes()
