"""Checks of the data through the commands: contents are reported, mistakes are refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import SHAPES
from hatnet_dense.cli import main
from hatnet_testing import check, error_line

RETINANET, MASK_RCNN, SEMFPN = (str(SHAPES / f"{name}.py") for name in ("retinanet", "mask-rcnn", "semfpn"))


@pytest.fixture
def data(shapes, tmp_path, monkeypatch):
    """Copy the drawn data, to damage it; the configs name the copy."""
    copied = tmp_path / "data"
    shutil.copytree(shapes, copied)
    monkeypatch.setenv("SHAPES", str(copied))
    return copied


def change(data, split, edit):
    """Edit the annotation file of a split."""
    path = data / "annotations" / f"instances_{split}2017.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def train(config, tmp_path, *options):
    quick = ["train_cfg.val_interval=100", "default_hooks.checkpoint.interval=100", "param_scheduler=[]"]
    length = "train_cfg.max_iters=1" if config == SEMFPN else "train_cfg.max_epochs=1"
    return main(["train", config, "--work-dir", str(tmp_path / "run"), "--cfg-options", *quick, length, *options])


def refuses(config, tmp_path, capsys, *named, options=()):
    """Check that training ends in one line."""
    assert train(config, tmp_path, *options) == 1
    error_line(capsys.readouterr().err, "hatnet-dense train", *named)


def repeat_first_image(content):
    content["images"][1]["id"] = content["images"][0]["id"]


def make_relative(content):
    for annotation in content["annotations"]:
        annotation["bbox"] = [value / 200 for value in annotation["bbox"]]


def make_corners(content):
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]


@pytest.mark.parametrize(
    ("config", "edit", "named"),
    [
        (RETINANET, lambda c: c["annotations"][3].pop("area"), ["annotations[3]", "area"]),
        (RETINANET, lambda c: c["annotations"][3].pop("bbox"), ["annotations[3]", "bbox"]),
        (MASK_RCNN, lambda c: c["annotations"][3].pop("segmentation"), ["annotations[3]", "segmentation"]),
        (RETINANET, lambda c: [a.update(id=a["id"] - 1) for a in c["annotations"]], ["annotations[0].id"]),
        (RETINANET, repeat_first_image, ["images[1]", "images[0]"]),
        (RETINANET, make_relative, ["annotations[0].bbox", "pixels"]),
        (RETINANET, make_corners, ["].bbox", "[x, y, width, height]"]),
        (RETINANET, lambda c: c["annotations"][3].update(category_id=9), ["annotations[3].category_id", "9"]),
        (RETINANET, lambda c: [a.update(category_id="1") for a in c["annotations"]], ["[0].category_id", "'1'"]),
    ],
)
def test_training_refuses_annotations_with_the_file_and_the_record(config, edit, named, data, tmp_path, capsys):
    path = change(data, "train", edit)
    refuses(config, tmp_path, capsys, path, *named)


def test_training_refuses_evaluation_data_with_an_id_of_0(data, tmp_path, capsys):
    path = change(data, "val", lambda c: c["annotations"][0].update(id=0))
    refuses(RETINANET, tmp_path, capsys, path, "annotations[0].id")


def test_training_begins_with_a_line_of_what_is_used_and_skipped(data, tmp_path):
    def edit(content):
        last = content["images"][-1]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != last]
        content["annotations"][0]["bbox"][2] = 0

    path = change(data, "train", edit)
    content = json.loads(path.read_text())
    assert train(RETINANET, tmp_path, "train_dataloader.dataset.filter_cfg.min_size=1") == 0
    (log,) = (tmp_path / "run").glob("*/*.log")
    (line,) = [line for line in log.read_text().splitlines() if "training data: " in line]
    check(
        line, "15 images", f"{len(content['annotations']) - 1} boxes", "1 box", "1 image", "filter_cfg.filter_empty_gt"
    )
    for i, name in enumerate(("disk", "square", "triangle"), 1):
        check(line, f"{name} {sum(a['category_id'] == i for a in content['annotations'][1:])}")


def test_check_names_a_picture_whose_pixels_cannot_be_read(data, capsys):
    content = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    picture = data / "train2017" / content["images"][0]["file_name"]
    picture.write_bytes(picture.read_bytes()[:-200])
    assert main(["check", RETINANET]) == 1
    assert picture.name in capsys.readouterr().out


def label_files(data, split="training"):
    return sorted((data / "annotations" / split).glob("*.png"))


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda labels: np.where(labels > 1, 255, 0), ["000001.png", "255"]),
        (lambda labels: np.stack([labels] * 3, -1) * 60, ["000001.png", "RGB"]),
        (lambda labels: labels * 0, ["000001.png", "255"]),
    ],
    ids=["0 and 255", "colours", "nothing"],
)
@pytest.mark.parametrize("reduce", ["True", "False"])
def test_training_refuses_label_images_that_are_misread(draw, named, reduce, data, tmp_path, capsys):
    if reduce == "False" and named[1] == "255" and not draw(np.array(2)):
        pytest.skip("0 is a class then")
    for path in label_files(data):
        Image.fromarray(draw(np.array(Image.open(path))).astype(np.uint8)).save(path)
    options = [f"train_dataloader.dataset.reduce_zero_label={reduce}"]
    options.append(f"train_dataloader.dataset.pipeline.1.reduce_zero_label={reduce}")
    refuses(SEMFPN, tmp_path, capsys, *named, options=options)


def test_a_label_image_of_16_bits_is_refused_rather_than_cut_to_8(data, tmp_path, capsys):
    path = label_files(data)[2]
    labels = np.array(Image.open(path)).astype(np.uint16) + 256
    Image.fromarray(labels).save(path)
    assert main(["check", SEMFPN]) == 1
    assert f"{path}: " in capsys.readouterr().out


def test_check_counts_the_objects_of_each_class(data, capsys):
    assert main(["check", RETINANET]) == 0
    lines = capsys.readouterr().out.splitlines()
    content = json.loads((data / "annotations" / "instances_train2017.json").read_text())
    disks = sum(annotation["category_id"] == 1 for annotation in content["annotations"])
    (line,) = [line for line in lines if line.startswith("training data: ")]
    check(line, "16 images", f"{len(content['annotations'])} boxes")
    assert f"  disk {disks}" in lines


def test_check_counts_the_pixels_of_each_class_and_the_files_of_another_suffix(data, capsys):
    shutil.copy(data / "images" / "training" / "000001.jpg", data / "images" / "training" / "extra.jpeg")
    assert main(["check", SEMFPN]) == 0
    counts = sum(np.bincount(np.array(Image.open(path)).ravel(), minlength=5) for path in label_files(data))
    out = capsys.readouterr().out
    check(next(line for line in out.splitlines() if "training" in line), "16 images", f"{counts[1:].sum():,}")
    assert f"  disk {100 * counts[2] / counts[1:].sum():.1f} %" in out.splitlines()
    assert "extra.jpeg" in out


def test_check_names_all_problems_at_once(data, capsys):
    (data / "train2017" / "000002.jpg").unlink()
    (data / "train2017" / "000003.jpg").write_text("<html>")
    shutil.copy(data / "train2017" / "000001.jpg", data / "val2017" / "000004.jpg")
    path = change(data, "val", lambda c: c["annotations"][0].update(id=0) or c["annotations"][1].pop("area"))
    assert main(["check", RETINANET, "--cfg-options", "model.bbox_head.num_classes=80"]) == 1
    out = capsys.readouterr().out
    problems = [line for line in out.splitlines() if line.startswith("problem: ")]
    for text in ("000002.jpg", "000003.jpg", "num_classes", f"{path}: annotations[1]"):
        assert any(text in line for line in problems)
    check(out.splitlines()[-1], len(problems))


def test_check_finds_the_same_picture_in_training_and_validation_by_its_content(data, capsys):
    first, second = data / "images" / "training" / "000005.jpg", data / "images" / "validation" / "000002.jpg"
    shutil.copy(first, second)
    with Image.open(first) as image:
        labels = np.ones(image.size[::-1], dtype=np.uint8)
    Image.fromarray(labels).save(data / "annotations" / "validation" / "000002.png")
    assert main(["check", SEMFPN]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("problem: ")]
    check(line, first, second)


def test_check_prints_a_bounded_number_of_problems(data, capsys):
    path = data / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"] += [{**content["images"][0], "id": 100 + i, "file_name": f"no{i}.jpg"} for i in range(70)]
    box = content["annotations"][0]
    content["annotations"] += [{**box, "id": 1000 + i, "image_id": 100 + i} for i in range(70)]
    path.write_text(json.dumps(content))
    assert main(["check", RETINANET]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("problem: ") for line in lines) == 50
    check(lines[-1], 70)


def test_check_writes_nothing(data, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["check", RETINANET]) == 0
    assert list(Path().iterdir()) == []
