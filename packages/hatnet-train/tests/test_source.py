import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from hatnet_testing import check, raises
from hatnet_train.data import open_split
from hatnet_train.data.source import Digits, Synthetic


@pytest.fixture(scope="module")
def training():
    return Digits(train=True)


@pytest.fixture(scope="module")
def held_out():
    return Digits(train=False)


def test_every_digit_is_in_one_part_of_the_split_and_360_are_held_out(training, held_out):
    assert (len(training), len(held_out)) == (1437, 360)
    scans, labels = np.concatenate([training.scans, held_out.scans]), [*training.labels, *held_out.labels]
    everything = sorted((scan.tobytes(), int(label)) for scan, label in zip(scans, labels, strict=True))
    source = load_digits()
    pixels = (source.images * 255 / 16).round().astype(np.uint8)
    assert everything == sorted((p.tobytes(), int(y)) for p, y in zip(pixels, source.target, strict=True))


def test_the_split_has_the_class_shares_of_the_whole_and_is_always_the_same(held_out):
    expected = np.bincount(load_digits().target) / 1797
    assert np.abs(np.bincount(held_out.labels) / 360 - expected).max() < 1 / 360
    assert np.array_equal(Digits(train=False).labels, held_out.labels)


def test_images_are_the_scans_in_three_channels(held_out):
    image = held_out.image(7)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(held_out.scans[7]).expand(3, 8, 8))


def test_the_name_of_a_digit_is_its_number_in_scikit_learn(held_out):
    number = int(held_out.name(3).removeprefix("digit "))
    assert load_digits().target[number] == held_out.labels[3]


def test_the_parts_of_a_split_have_digests_of_their_own(training, held_out):
    assert training.digest() != held_out.digest()
    assert training.digest() == Digits(train=True).digest()


def test_synthetic_data_have_the_sizes_of_imagenet_and_images_of_the_size_asked_for():
    training, held_out = (open_split("synthetic", train=train, size=50) for train in (True, False))
    assert isinstance(training, Synthetic)
    assert (len(training), len(held_out), len(training.classes)) == (1_281_167, 50_000, 1000)
    assert training.image(1_281_166).shape == (3, 50, 50)
    assert torch.equal(training.image(5), training.image(5))
    assert not torch.equal(training.image(5), training.image(6))
    assert not torch.equal(training.image(5), held_out.image(5))
    assert training.labels[1_281_166] == 166


@pytest.mark.parametrize(
    ("files", "way_out"),
    [
        ((), "hatnet-shards"),
        (("n01440764/x.jpg",), "n01440764"),
        (("train/a/x.jpg",), "train/"),
        (("../val/a/x.jpg",), "{parent}"),
    ],
)
def test_a_folder_without_the_split_is_refused_with_the_way_out(files, way_out, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    with raises(FileNotFoundError, root, "val/") as caught:
        open_split(str(root), train=False, size=32)
    check(str(caught.value).replace(str(root), ""), way_out.format(parent=tmp_path))


def test_held_out_images_of_a_folder_have_the_classes_of_its_training_images(tmp_path):
    for file in ("train/ant/x.jpg", "train/bee/x.jpg", "val/bee/x.jpg"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    held_out = open_split(str(tmp_path), train=False, size=32)
    assert (held_out.classes, held_out.labels.tolist()) == (("ant", "bee"), [1])


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with raises(FileNotFoundError, tmp_path / "nowhere", "digits", "synthetic"):
        open_split(str(tmp_path / "nowhere"), train=True, size=32)
