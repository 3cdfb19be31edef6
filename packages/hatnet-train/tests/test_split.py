"""Held-out images where the data has no folder for them, by class, seed and share; and the layouts that are read."""

import numpy as np
import pytest
from PIL import Image

from hatnet_testing import raises
from hatnet_train.data import Split, open_split
from hatnet_train.data.check import check_data
from hatnet_train.data.split import held_out_places


def draw(root, **counts):
    """Folders of so many images; all differ."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, *name.encode()[:2])).save(root / name / f"{i}.png")


def names(source):
    return {source.name(i) for i in range(len(source))}


def both(root, split, **kwargs):
    return [open_split(str(root), train=train, size=32, split=split, **kwargs) for train in (True, False)]


def test_every_class_gives_its_share_by_the_seed_alone():
    labels = np.repeat([2, 0, 1], [50, 100, 10])
    chosen = held_out_places(labels, 3, Split(held_out=0.2), "x")
    assert np.bincount(labels[chosen]).tolist() == [20, 2, 10]
    assert np.array_equal(chosen, held_out_places(labels, 3, Split(held_out=0.2), "x"))
    assert not np.array_equal(chosen, held_out_places(labels, 3, Split(held_out=0.2, seed=1), "x"))


def test_a_class_of_two_images_is_on_both_sides_and_one_of_a_single_image_is_trained():
    labels = np.repeat([0, 1, 2], [2, 1, 30])
    chosen = held_out_places(labels, 3, Split(held_out=0.1), "x")
    assert np.bincount(labels[chosen], minlength=3).tolist() == [1, 0, 3]


def test_too_few_images_to_hold_any_out_are_refused():
    with raises(ValueError, "photos", 4, 2, "val/"):
        held_out_places(np.array([0, 0, 1, 1]), 2, Split(held_out=0.2), "photos")


@pytest.mark.parametrize("below", ["", "train"])
def test_a_folder_of_classes_and_train_alone_are_divided_without_loss_or_overlap(below, tmp_path):
    draw(tmp_path / below, cat=10, dog=20)
    training, held_out = both(tmp_path, Split(held_out=0.2))
    assert training.classes == held_out.classes == ("cat", "dog")
    assert (len(training), len(held_out)) == (24, 6)
    assert names(training) | names(held_out) == {str(path) for path in (tmp_path / below).glob("*/*.png")}
    assert len({training.digest(), held_out.digest(), both(tmp_path, Split(held_out=0.2, seed=3))[1].digest()}) == 3
    assert all(source.image(0).shape == (3, 8, 8) for source in (training, held_out))


@pytest.mark.parametrize("folder", ["val", "validation", "test"])
def test_held_out_images_in_a_folder_of_their_own_are_taken_whatever_the_share(folder, tmp_path):
    draw(tmp_path / "train", cat=3, dog=3)
    draw(tmp_path / folder, cat=1)
    training, held_out = both(tmp_path, Split(held_out=0.5))
    assert len(training) == 6
    assert names(held_out) == {str(tmp_path / folder / "cat" / "0.png")}


def test_the_data_is_checked_as_it_would_be_divided(tmp_path):
    draw(tmp_path, cat=10, dog=10)
    found = check_data(str(tmp_path), size=32, workers=0, split=Split(held_out=0.3))
    assert (found.counts, found.problems) == ({"cat": (7, 3), "dog": (7, 3)}, [])


@pytest.fixture
def table(tmp_path):
    """Write a CSV file for a folder with a.png to d.png, and open both of its sides."""
    draw(tmp_path, images=8)
    for i, name in enumerate("abcdefgh"):
        (tmp_path / "images" / f"{i}.png").rename(tmp_path / "images" / f"{name}.png")

    def write(text, **split):
        (tmp_path / "labels.csv").write_text(text, encoding="utf-8-sig")
        return both(tmp_path / "images", Split(labels=str(tmp_path / "labels.csv"), **split))

    return write


def test_labels_and_splits_come_from_a_csv_file(table):
    rows = ["a.png,cat,train", "b.png,dog,train", "c.png,cat,test", "d.png,dog,val"]
    training, held_out = table("\n".join(["Filename,label,split", *rows]))
    assert training.classes == held_out.classes == ("cat", "dog")
    assert [(training.name(i)[-5], training.labels[i]) for i in range(2)] == [("a", 0), ("b", 1)]
    assert [(held_out.name(i)[-5], held_out.labels[i]) for i in range(len(held_out))] == [("d", 1)]


def test_labels_without_splits_are_divided_by_the_share(table):
    text = "file,label\n" + "".join(f"{name}.png,{'cat' if name < 'e' else 'dog'}\n" for name in "abcdefgh")
    training, held_out = table(text, held_out=0.25)
    assert (len(training), len(held_out)) == (6, 2)
    assert sorted(held_out.labels.tolist()) == [0, 1]
    with raises(ValueError, "held_out", 0.0):
        table(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", ["file", "label"]),
        ("file,kind\na.png,cat\n", ["label", "kind"]),
        ("file,label\n", []),
        ("file,label\n../images/a.png,cat\n", ["line 2", "'../images/a.png'"]),
        ("file,label\n/etc/hostname,cat\n", ["line 2", "'/etc/hostname'"]),
        ("file,label\na.png,cat\nz.png,cat\n", ["line 3", "z.png"]),
        ("file,label\na.png,\n", ["line 2", "label"]),
        ("file,label\na.png,cat\na.png,dog\n", ["line 3", "a.png", "cat", "dog"]),
        ("file,label,split\na.png,cat,held\n", ["line 2", "'held'"]),
        ("file,label,split\na.png,cat,train\n", ["split", "val"]),
        ("file,label,split\na.png,cat,test\n", ["split", "train"]),
    ],
)
def test_a_csv_file_is_refused_by_line_and_value(text, named, table, tmp_path):
    with raises(ValueError, tmp_path / "labels.csv", *named):
        table(text, held_out=0.5)


def test_labels_have_no_place_with_data_that_has_its_own():
    with raises(ValueError, "labels", "digits"):
        open_split("digits", train=True, size=32, split=Split(labels="labels.csv"))
