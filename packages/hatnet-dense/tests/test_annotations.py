"""COCO files: what is wrong with one is a line that names the file and the record."""

import copy
import json

import pytest
from mmengine.config import Config

from hatnet_dense.annotations import annotation_problem, problem_of_coco

CLASSES = ["disk", "square"]
GOOD = {
    "images": [{"id": 7, "file_name": "a.jpg", "height": 30, "width": 40}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12}],
    "categories": [{"id": 1, "name": "disk"}, {"id": 2, "name": "square"}],
}


def written(path, change):
    content = copy.deepcopy(GOOD)
    change(content)
    path.write_text(json.dumps(content))
    return path


def test_a_good_file_has_no_problem(tmp_path):
    assert problem_of_coco(written(tmp_path / "a.json", lambda _: None), CLASSES) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "expected a list under 'images'"),
        (lambda c: c["images"][0].pop("file_name"), "images[0] has no file_name: {'id': 7"),
        (lambda c: c["annotations"][0].pop("bbox"), "annotations[0] has no bbox: {'id': 1"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), "annotations[0].bbox must be [x, y, width, height]"),
        (lambda c: c["annotations"][0].update(image_id=8), "annotations[0] is of image_id 8, which is none of"),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": None, "counts": "x"}),
            "annotations[0].segmentation must have counts and size, got {'size': None",
        ),
        (lambda c: c["categories"].reverse(), "its categories are in the order ['square', 'disk']"),
        (
            lambda c: c["categories"].pop(),
            "it has 1 of the 2 classes of the config: expected metainfo.classes=['disk']",
        ),
    ],
)
def test_a_defect_is_named_with_the_file_and_the_record(change, message, tmp_path):
    path = written(tmp_path / "a.json", change)
    found = problem_of_coco(path, CLASSES)
    assert found.startswith(f"{path}: {message}")


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("<html>")
    assert problem_of_coco(tmp_path / "a.json").startswith(f"{tmp_path / 'a.json'} is no JSON")


@pytest.mark.parametrize(
    "config",
    [
        {
            "train_dataloader": {
                "dataset": {"dataset": {"type": "CocoDataset", "data_root": "ROOT", "ann_file": "a.json"}}
            }
        },
        {"test_dataloader": {"dataset": {"datasets": [{"type": "CocoDataset", "ann_file": "ROOT/a.json"}]}}},
        {"val_evaluator": [{"type": "CocoMetric", "ann_file": "ROOT/a.json"}]},
    ],
)
def test_every_file_that_a_config_names_is_found(config, tmp_path):
    (tmp_path / "a.json").write_text("{}")
    placed = json.loads(json.dumps(config).replace("ROOT", str(tmp_path)))
    assert annotation_problem(Config(placed)).startswith(f"{tmp_path / 'a.json'}: ")
