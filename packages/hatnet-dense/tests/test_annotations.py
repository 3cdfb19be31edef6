"""Problems of COCO files, which MMDetection would skip or misread, name the file, the record and the value."""

import copy
import json

import pytest
from mmengine.config import Config

from hatnet_dense.annotations import annotation_problems, coco_problems, leaving, skipped_of
from hatnet_testing import check

CLASSES = ["disk", "square"]
GOOD = {
    "images": [{"id": 7, "file_name": "a.jpg", "height": 30, "width": 40}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [20, 10, 5, 5], "area": 25},
    ],
    "categories": [{"id": 1, "name": "disk"}, {"id": 2, "name": "square"}],
}


def written(path, change):
    content = copy.deepcopy(GOOD)
    change(content)
    path.write_text(json.dumps(content))
    return path


def each(key, values):
    """Set a key of every annotation, from a list or by a function of its value."""

    def change(content):
        for i, annotation in enumerate(content["annotations"]):
            annotation[key] = values(annotation[key]) if callable(values) else values[i]

    return change


def corners(box):
    x, y, width, height = box
    return [x + 12, y, x + 12 + width, y + height]


def test_a_good_file_has_no_problem(tmp_path):
    assert coco_problems(written(tmp_path / "a.json", lambda _: None), CLASSES) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c.pop("images"), ["images", "NoneType"]),
        (lambda c: c["images"][0].pop("file_name"), ["images[0]", "file_name"]),
        (lambda c: c["images"][0].update(width="40"), ["images[0].width", "'40'"]),
        (lambda c: c["annotations"][0].pop("bbox"), ["annotations[0]", "bbox"]),
        (lambda c: c["annotations"][0].pop("area"), ["annotations[0]", "area"]),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), ["annotations[0].bbox", "[1, 2]"]),
        (lambda c: c["annotations"][0].update(bbox=[9, 9, -3, -4]), ["annotations[0].bbox", "[9, 9, -3, -4]"]),
        (lambda c: c["annotations"][0].update(image_id=8), ["annotations[0].image_id", "images", "8"]),
        (lambda c: c["annotations"][1].update(category_id=3), ["annotations[1].category_id", "categories", "3"]),
        (lambda c: c["annotations"][0].update(category_id="1"), ["annotations[0].category_id", "'1'"]),
        (lambda c: c["images"][0].update(id="7"), ["images[0].id", "'7'"]),
        (lambda c: c["annotations"][0].update(id=0), ["annotations[0].id", "0"]),
        (lambda c: c["annotations"][1].update(id=1), ["annotations[1]", "annotations[0]", "1"]),
        (lambda c: c["images"].append({**c["images"][0], "file_name": "b.jpg"}), ["images[1]", "images[0]", "7"]),
        (each("bbox", lambda box: [v / 40 for v in box]), ["annotations[0].bbox", "pixels", "0.025"]),
        (each("bbox", corners), ["annotations[1].bbox", "[32, 10, 37, 15]", "40×30", "[x1, y1, x2, y2]"]),
        (lambda c: c["annotations"][0].update(bbox=[50, 2, 3, 4]), ["annotations[0].bbox", "[50, 2, 3, 4]", "40×30"]),
        (
            lambda c: c["annotations"][0].update(segmentation={"size": None, "counts": "x"}),
            ["[0].segmentation", "None"],
        ),
        (
            lambda c: c["annotations"][0].update(segmentation=[1, 2, 3, 4, 5, 6]),
            ["annotations[0].segmentation", "[1, 2"],
        ),
        (lambda c: c["categories"].reverse(), ["categories", "order", "square, disk"]),
        (lambda c: c["annotations"].clear() or c["categories"].pop(), ["categories", "without square"]),
    ],
)
def test_a_problem_names_the_file_the_record_and_the_value(change, named, tmp_path):
    path = written(tmp_path / "a.json", change)
    found = coco_problems(path, CLASSES)
    assert len(found) == 1
    check(found[0], path, *named)


def test_problems_of_one_kind_are_one_line_with_their_number_and_other_kinds_follow(tmp_path):
    def change(content):
        for annotation in content["annotations"]:
            annotation["image_id"] = 9
        content["annotations"][1]["id"] = 0

    images, zero = coco_problems(written(tmp_path / "a.json", change), CLASSES)
    check(images, "annotations[0].image_id", 1)
    check(zero, "annotations[1].id")


def test_an_object_without_a_mask_is_named_where_masks_are_needed(tmp_path):
    path = written(tmp_path / "a.json", lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6]]))
    assert coco_problems(path, CLASSES) == []
    (found,) = coco_problems(path, CLASSES, masks=True)
    check(found, "annotations[1]", "segmentation")


def boxes(*values):
    content = copy.deepcopy(GOOD)
    content["annotations"] = [
        {"id": i, "image_id": 7, "category_id": 1, "bbox": list(box), "area": 9} for i, box in enumerate(values, 1)
    ]
    return content


@pytest.mark.parametrize("odd", [(1, 1, 2, 2), (0.5, 0.5, 0.2, 0.1)])
@pytest.mark.parametrize(("box", "named"), [((25, 20, 39, 29), "x1"), ((0.4, 0.4, 0.3, 0.2), "pixels")])
def test_one_odd_box_does_not_hide_the_form_of_all_others(box, named, odd, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(boxes(*[box] * 60, odd)))
    (found,) = coco_problems(tmp_path / "a.json", CLASSES)
    assert named in found


def test_a_few_large_boxes_that_leave_their_images_are_not_taken_for_corners(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(boxes((1, 1, 41, 28), *[(2, 3, 30, 20)] * 7)))
    assert coco_problems(tmp_path / "a.json", CLASSES) == []


def test_a_box_that_leaves_its_image_among_others_that_cannot_be_corners_is_counted(tmp_path):
    content = copy.deepcopy(GOOD)
    content["annotations"][0]["bbox"] = [30, 2, 20, 4]
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert coco_problems(tmp_path / "a.json", CLASSES) == []
    assert leaving(content) == 1


def test_what_is_skipped_is_counted_by_its_reason():
    content = copy.deepcopy(GOOD)
    content["images"] += [{"id": i, "file_name": f"{i}.jpg", "height": 30, "width": 40} for i in (8, 9)]
    content["images"].append({"id": 10, "file_name": "10.jpg", "height": 3, "width": 4})
    box = {"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12}
    content["annotations"] += [
        {**box, "id": 3, "bbox": [1, 2, 0, 0], "area": 0},
        {**box, "id": 4, "category_id": 2},
        {**box, "id": 5, "iscrowd": 1},
        {**box, "id": 6, "image_id": 10, "bbox": [0, 0, 2, 2]},
        {**box, "id": 7, "ignore": 1},
    ]
    lines = skipped_of(content, {7}, ["disk"], min_size=32)
    named = {
        "filter_cfg.filter_empty_gt": 2,
        "filter_cfg.min_size": 1,
        "area": 1,
        "square": 2,
        "crowd": 1,
        "ignored": 1,
    }
    assert len(lines) == len(named)
    for name, count in named.items():
        (line,) = [line for line in lines if name in line]
        assert int(line.split()[0]) == count


def test_a_file_that_is_not_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("<html>")
    (found,) = coco_problems(tmp_path / "a.json")
    check(found, tmp_path / "a.json")


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
    assert all(problem.startswith(f"{tmp_path / 'a.json'}: ") for problem in annotation_problems(Config(placed)))
    assert len(annotation_problems(Config(placed))) == 3
