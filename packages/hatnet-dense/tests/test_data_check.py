"""Checks of a dataset's files before the first step, and of label images during the run."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from hatnet_dense import DataCheckHook
from hatnet_dense.data_check import check_classes, check_dataset, naming_files
from hatnet_dense.records import ORIENTATION, problem_of
from hatnet_testing import check, raises

WIDTH, HEIGHT = 41, 31


class Records(list):
    """Dataset with the records of a list."""

    def get_data_info(self, i):
        return self[i]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    return path


def labels_of(tmp_path, width, height):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((height, width), dtype=np.uint8)).save(path)
    return path


def test_records_whose_files_agree_pass(image, tmp_path):
    shape = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    shape[3:20, 4:30] = shape[25:, 7] = 1
    mask = coco_mask.encode(shape)
    plain = {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT - 9, 9]}
    detection = {
        "img_path": image,
        "width": WIDTH,
        "height": HEIGHT,
        "instances": [{"mask": mask}, {"mask": plain}, {"mask": [[1, 2]]}],
    }
    segmentation = {"img_path": image, "seg_map_path": labels_of(tmp_path, WIDTH, HEIGHT)}
    check_dataset(Records([detection, segmentation]), "data")


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"img_path": "b.jpg"}, ["b.jpg"]),
        ({"img_path": "c.jpg"}, ["c.jpg"]),
        ({"img_path": "a.jpg", "seg_map_path": "b.png"}, ["b.png"]),
        ({"img_path": "a.jpg", "seg_map_path": "a.png"}, ["a.png", "31×41", "a.jpg", "41×31"]),
        ({"img_path": "a.jpg", "width": 50, "height": HEIGHT}, ["a.jpg", "41×31", "50×31"]),
        ({"img_path": "a.jpg", "instances": [{"mask": {"size": [HEIGHT, 40], "counts": "x"}}]}, ["a.jpg", "40×31"]),
        ({"img_path": "a.jpg", "instances": [{"mask": {"counts": "x"}}]}, ["a.jpg", "mask", "size"]),
        ({"img_path": "a.jpg", "instances": [{"mask": {"size": None, "counts": "x"}}]}, ["a.jpg", "mask", "size"]),
    ],
    ids=["missing", "no image", "missing labels", "labels", "annotation", "mask", "mask without size", "mask of null"],
)
def test_files_that_are_missing_or_do_not_agree_are_named_with_both_sizes(record, named, image, tmp_path):
    labels_of(tmp_path, HEIGHT, WIDTH)
    (tmp_path / "c.jpg").write_text("<html>")
    placed = {key: str(tmp_path / value) if key.endswith("path") else value for key, value in record.items()}
    check(problem_of(placed), *(tmp_path / text if text.endswith(("jpg", "png")) else text for text in named))


def test_the_size_is_that_of_the_picture_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned by a quarter
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "t.jpg", exif=exif)
    assert problem_of({"img_path": tmp_path / "t.jpg", "width": HEIGHT, "height": WIDTH}) is None


def test_images_behind_an_address_are_not_looked_at():
    assert problem_of({"img_path": "s3://bucket/a.jpg"}) is None


def test_every_problem_is_counted_and_the_first_are_named(image, tmp_path):
    records = Records([{"img_path": str(tmp_path / f"{i}.jpg")} for i in range(5)] + [{"img_path": str(image)}])
    with raises(ValueError, "training data", 5, *(tmp_path / f"{i}.jpg" for i in range(3))):
        check_dataset(records, "training data")


def test_the_datasets_inside_of_wrappers_are_checked(tmp_path):
    inner = Records([{"img_path": str(tmp_path / "b.jpg")}])
    repeated = SimpleNamespace(dataset=SimpleNamespace(datasets=[Records(), inner]))
    with raises(ValueError, "data", tmp_path / "b.jpg"):
        check_dataset(repeated, "data")


def test_the_hook_checks_what_is_about_to_be_used(tmp_path):
    def loader(*names):
        return SimpleNamespace(dataset=Records([{"img_path": str(tmp_path / name)} for name in names]))

    runner = SimpleNamespace(
        model=nn.Module(),
        logger=logging.getLogger("test"),
        train_dataloader=loader(),
        val_loop=None,
        val_dataloader=loader("v.jpg"),
        test_dataloader=loader("t.jpg"),
    )
    DataCheckHook().before_train(runner)
    with raises(ValueError, tmp_path / "t.jpg"):
        DataCheckHook().before_test(runner)
    runner.val_loop = object()
    with raises(ValueError, tmp_path / "v.jpg"):
        DataCheckHook().before_train(runner)


@pytest.mark.parametrize("cut", [slice(0, -6), slice(3, None), slice(0, 0)])
def test_run_lengths_that_do_not_add_up_are_named_with_the_image(cut, image):
    shape = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    shape[3:20, 4:30] = 1
    counts = coco_mask.encode(shape)["counts"].decode()[cut]
    record = {"img_path": image, "instances": [{"mask": {"size": [HEIGHT, WIDTH], "counts": counts}}]}
    check(problem_of(record), image, "mask", repr(counts[:40]), f"{WIDTH}×{HEIGHT}")


def test_an_image_of_more_pixels_than_pillow_opens_is_left_to_the_loader(image, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert problem_of({"img_path": image}) is None


def test_pictures_that_another_loader_reads_are_not_looked_at(tmp_path):
    class Dataset(Records):
        pipeline = SimpleNamespace(transforms=[SimpleNamespace()])

    (tmp_path / "a.npy").write_bytes(b"")
    check_dataset(Dataset([{"img_path": str(tmp_path / "a.npy")}]), "data")


def detector(num_classes):
    """Build modules named as in a detector; the RPN head has another number of classes."""
    model = nn.ModuleDict({name: nn.Module() for name in ("rpn_head", "bbox_head")})
    model.rpn_head.num_classes = 1
    model.bbox_head.num_classes = num_classes
    return model


def test_heads_of_another_number_of_classes_are_named_with_both():
    metainfo = {"classes": ("disk", "square", "triangle")}
    check_classes(detector(3), metainfo, "training data")
    with raises(ValueError, "training data", "disk, square, triangle", "model.bbox_head.num_classes", 3, 80):
        check_classes(detector(80), metainfo, "training data")


class Loaded(Records):
    """Dataset of MMSegmentation with a given pipeline."""

    metainfo = {"classes": ("a", "b")}  # noqa: RUF012
    ignore_index = 255

    def __init__(self, pipeline):
        super().__init__([{"img_path": "a.jpg", "seg_map_path": "a.png"}])
        self.pipeline = pipeline


def labelled(values):
    sample = SegDataSample(gt_sem_seg=PixelData(data=torch.tensor([values])))
    return Loaded(lambda _: {"data_samples": sample})


def loaded(dataset):
    built = naming_files(lambda: SimpleNamespace(dataset=dataset))().dataset
    return built.pipeline(built[0])


def test_a_loader_that_fails_names_the_files():
    def fail(_):
        raise AssertionError("failed to load image")

    with raises(ValueError, "a.jpg", "a.png", "AssertionError: failed to load image"):
        loaded(Loaded(fail))


def test_a_label_outside_of_the_classes_names_the_file_and_the_value():
    assert "data_samples" in loaded(labelled([[0, 1], [255, 1]]))
    with raises(ValueError, "a.png", 7, 0, 1, 255):
        loaded(labelled([[0, 7], [255, 1]]))
