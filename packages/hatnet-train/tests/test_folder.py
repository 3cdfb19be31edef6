import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hatnet_testing import check, raises
from hatnet_train.data import log_usage
from hatnet_train.data.folder import Folder
from hatnet_train.data.images import read_image
from hatnet_train.recipes import build_config
from hatnet_train.train import open_both
from image_folders import draw_coloured_images

SYNSETS = ("n01440764", "n01443537", "n02105855")
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
"""Where to find the classes of the validation images."""


@pytest.fixture
def imagenet(tmp_path):
    """Three real ILSVRC class names with images of real file names, in unusual formats, among other files."""
    rng = np.random.default_rng(0)
    for place, synset in enumerate(SYNSETS):
        folder = tmp_path / "train" / synset
        folder.mkdir(parents=True)
        for i in range(place + 2):
            pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{synset}_{10 * i}.JPEG", "PNG" if i == 1 else "JPEG")
        (folder / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "train" / "README.txt").write_text("not a class")
    return tmp_path


def test_classes_are_the_folders_in_order_and_images_all_below_them(imagenet):
    deeper = imagenet / "train" / SYNSETS[1] / "more"
    deeper.mkdir()
    Image.new("RGB", (5, 4)).save(deeper / "é.webp")
    data = Folder(imagenet / "train")
    assert data.classes == SYNSETS
    assert np.bincount(data.labels).tolist() == [2, 4, 4]
    names = [data.name(i) for i in range(len(data))]
    assert names[0] == str(imagenet / "train" / SYNSETS[0] / "n01440764_0.JPEG")
    assert str(deeper / "é.webp") in names
    for i, name in enumerate(names):
        assert torch.equal(data.image(i), read_image(name))
        assert SYNSETS[data.labels[i]] in name


def test_files_are_images_by_suffix_in_any_case_and_hidden_folders_are_not_read(imagenet):
    place = imagenet / "train" / SYNSETS[0]
    for name in ("a.jfif", "b.GIF", "c.avif", "d.apng", ".e.png", "._f.jpg", ".ipynb_checkpoints/g.jpg", ".x/h/i.png"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).touch()
    (imagenet / "train" / ".ipynb_checkpoints").mkdir()
    data = Folder(imagenet / "train")
    assert data.classes == SYNSETS
    names = {Path(data.name(i)).name for i in np.flatnonzero(data.labels == 0)}
    assert names - {"n01440764_0.JPEG", "n01440764_10.JPEG"} == {"a.jfif", "b.GIF", "c.avif", "d.apng"}
    # .e.png, ._f.jpg, three Thumbs.db, README.txt; .ipynb_checkpoints twice and .x
    assert (data.skipped.files, data.skipped.folders) == (6, 3)


def test_the_line_on_what_is_used_counts_images_and_names_the_first_that_was_skipped(imagenet, caplog):
    training = Folder(imagenet / "train")
    (imagenet / "val" / SYNSETS[0]).mkdir(parents=True)
    Image.new("RGB", (5, 4)).save(imagenet / "val" / SYNSETS[0] / "x.png")
    with caplog.at_level("INFO"):
        log_usage(Folder(imagenet / "val", SYNSETS), training)
    line, warning = caplog.messages
    check(line, "train/README.txt")
    assert re.findall(r"\d+", line) == ["9", "3", "1", "4"]  # training images, classes, held-out images, skipped files
    check(warning, *SYNSETS[1:])
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_every_problem_of_a_folder_is_reported_where_it_is_not_raised(imagenet):
    (imagenet / "train" / "n09999999").mkdir()
    (imagenet / "train" / "N01440764 ").mkdir()
    (imagenet / "train" / SYNSETS[1] / "loop").symlink_to(imagenet / "train" / SYNSETS[1])
    problems = []
    data = Folder(imagenet / "train", SYNSETS, problems.append)
    assert len(problems) == 3
    for name in ("'N01440764 '", "n09999999", f"{SYNSETS[1]}/loop"):
        assert any(name in problem for problem in problems)
    assert np.bincount(data.labels).tolist() == [2, 3, 4]


def test_held_out_images_have_the_labels_of_the_training_classes(imagenet):
    for synset in SYNSETS[1:]:
        (imagenet / "val" / synset).mkdir(parents=True)
        Image.new("RGB", (5, 4)).save(imagenet / "val" / synset / "ILSVRC2012_val_00000293.JPEG")
    assert Folder(imagenet / "val", SYNSETS).labels.tolist() == [1, 2]


def test_a_class_that_training_has_not_is_refused(imagenet):
    with raises(ValueError, imagenet / "train", SYNSETS[2]):
        Folder(imagenet / "train", SYNSETS[:2])


def test_the_digest_changes_with_names_and_classes_but_not_with_the_place(imagenet, tmp_path):
    before = Folder(imagenet / "train").digest()
    (imagenet / "train").rename(imagenet / "elsewhere")
    assert Folder(imagenet / "elsewhere").digest() == before
    moved = imagenet / "elsewhere" / SYNSETS[2] / "n02105855_0.JPEG"
    moved.rename(moved.with_name("n02105855_1.JPEG"))
    assert Folder(imagenet / "elsewhere").digest() != before


def test_an_unsorted_validation_folder_is_refused_with_the_place_of_its_classes(tmp_path):
    val = tmp_path / "val"
    val.mkdir()
    for i in range(1, 4):
        (val / f"ILSVRC2012_val_{i:08d}.JPEG").touch()
    with raises(ValueError, val, 3, "ILSVRC2012_val_00000001.JPEG", GROUND_TRUTH):
        Folder(val)
    inner = tmp_path / "other" / "images"
    inner.parent.mkdir()
    val.rename(inner)
    with raises(ValueError, inner, GROUND_TRUTH):
        Folder(inner.parent, SYNSETS)


def test_a_validation_folder_that_is_sorted_in_part_is_refused(imagenet):
    Image.new("RGB", (5, 4)).save(imagenet / "train" / "ILSVRC2012_val_00000293.JPEG")
    with raises(ValueError, imagenet / "train", 3, 1, "ILSVRC2012_val_00000293.JPEG", GROUND_TRUTH):
        Folder(imagenet / "train")


def test_links_are_followed_but_not_in_circles(imagenet):
    first = imagenet / "train" / SYNSETS[0]
    (first / "linked").symlink_to(imagenet / "train" / SYNSETS[1])
    assert np.bincount(Folder(imagenet / "train").labels).tolist() == [5, 3, 4]
    (first / "loop").symlink_to(imagenet / "train")
    with raises(ValueError, first / "loop", "link"):
        Folder(imagenet / "train")


def test_an_empty_class_folder_is_refused_by_path(imagenet):
    (imagenet / "train" / "n09999999").mkdir()
    with raises(ValueError, imagenet / "train" / "n09999999", ".apng"):
        Folder(imagenet / "train")


@pytest.mark.parametrize("twin", ["N01440764", "n01440764 "])
def test_two_classes_of_one_name_are_refused(twin, imagenet):
    (imagenet / "train" / twin).mkdir()
    with raises(ValueError, imagenet / "train", repr(twin), repr(SYNSETS[0])):
        Folder(imagenet / "train")


@pytest.mark.parametrize("content", [None, b"text"])
def test_an_image_that_cannot_be_read_is_refused_by_path(content, imagenet):
    path = imagenet / "train" / SYNSETS[0] / "n01440764_0.JPEG"
    data = Folder(imagenet / "train")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with raises(ValueError, path):
        data.image(0)


def test_an_empty_or_missing_split_is_refused(tmp_path):
    with raises(FileNotFoundError, tmp_path, "train/", "val/"):
        Folder(tmp_path / "train")
    with raises(ValueError, tmp_path, "class"):
        Folder(tmp_path)


def test_images_of_one_class_alone_are_nothing_to_train_on(tmp_path):
    draw_coloured_images(tmp_path, classes=1, train=2, val=1)
    with raises(ValueError, tmp_path, "class0"):
        open_both(build_config("digits", {"data": str(tmp_path)}))
