import json
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hatnet_core import create_model, read_metadata, save_checkpoint
from hatnet_testing import raises
from hatnet_train.classifier import load_classifier
from hatnet_train.data.augment import MEAN, STD


def test_a_checkpoint_of_a_run_says_all_that_is_needed(checkpoint):
    classifier = load_classifier(checkpoint)
    assert not classifier.model.training
    assert classifier.classes == [str(digit) for digit in range(10)]
    assert classifier.named
    assert (classifier.image_size, classifier.crop_fraction) == (32, 1.0)
    assert (tuple(classifier.mean), tuple(classifier.std)) == (MEAN, STD)


def test_what_a_checkpoint_says_of_itself_counts_also_where_its_variant_is_named(checkpoint):
    assert load_classifier(checkpoint, "hatnet_tiny").image_size == 32
    with raises(ValueError, "variant", checkpoint, "hatnet_tiny", "hatnet_small"):
        load_classifier(checkpoint, "hatnet_small")


def test_weights_alone_need_the_variant_and_are_prepared_as_in_the_paper(tmp_path):
    model = create_model("hatnet_tiny", num_classes=7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    with raises(ValueError, tmp_path / "weights.pth", "variant=NAME"):
        load_classifier(tmp_path / "weights.pth")
    classifier = load_classifier(tmp_path / "weights.pth", "hatnet_tiny")
    assert classifier.classes == [str(i) for i in range(7)]
    assert not classifier.named
    assert (classifier.image_size, classifier.crop_fraction, tuple(classifier.mean)) == (224, 0.875, MEAN)
    assert torch.equal(classifier.model.head.weight, model.head.weight)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    for name in ("nowhere.safetensors", "nowhere"):
        with raises(FileNotFoundError, tmp_path / name):
            load_classifier(tmp_path / name)


def test_a_checkpoint_for_other_images_than_rgb_is_refused_by_path(tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=2, in_chans=1), tmp_path / "grey.safetensors")
    with raises(ValueError, tmp_path / "grey.safetensors", "in_chans=1", 3):
        load_classifier(tmp_path / "grey.safetensors")


def test_a_checkpoint_without_class_names_is_refused(tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=2), tmp_path / "m.safetensors")
    with raises(ValueError, tmp_path / "m.safetensors", "classes"):
        load_classifier(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"classes": ["a"] * 9}, "classes"),
        ({"classes": ["a"] * 11}, "classes"),
        ({"image_size": 16}, "image_size"),
        ({"image_size": True}, "image_size"),
        ({"image_size": 10**9}, "image_size"),
        ({"crop_fraction": 1.5}, "crop_fraction"),
        ({"mean": 0.5}, "mean"),
        ({"mean": [0, 0]}, "mean"),
        ({"std": [0.1, 0.1, 0.0]}, "std[2]"),
        ({"std": [1, 1, "1"]}, "std[2]"),
        ({"config": {"zz": 1}}, "zz"),
        ({"config": {"embed_dims": 5, "depths": 5}}, "embed_dims"),
    ],
)
def test_a_record_that_does_not_fit_the_weights_is_refused_by_path(record, named, checkpoint, tmp_path):
    path = tmp_path / "m.safetensors"
    header = {"hatnet": json.dumps({**read_metadata(checkpoint), **record})}
    save_file(load_file(checkpoint), path, header)
    with raises(ValueError, path, named):
        load_classifier(path)


def test_a_record_with_whole_numbers_is_read(checkpoint, tmp_path):
    record = {**read_metadata(checkpoint), "mean": [0, 0, 0], "std": [1, 1, 1], "crop_fraction": 1}
    save_file(load_file(checkpoint), tmp_path / "m.safetensors", {"hatnet": json.dumps(record)})
    classifier = load_classifier(tmp_path / "m.safetensors")
    assert (classifier.mean, classifier.std, classifier.crop_fraction) == ((0, 0, 0), (1, 1, 1), 1)


def test_a_checkpoint_whose_weights_are_of_another_model_is_refused(checkpoint, tmp_path):
    with safe_open(checkpoint, "pt") as file:
        header = file.metadata()
    save_file(create_model("hatnet_small", num_classes=10).state_dict(), tmp_path / "m.safetensors", header)
    with raises(ValueError, tmp_path / "m.safetensors", "hatnet_small", "hatnet_tiny", 10):
        load_classifier(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"depths": [10**9, 1, 1, 1]}, [10**9 + 3]),
        ({"embed_dims": [10**6] * 4, "head_dim": 10**6}, ["hatnet_tiny", 10]),
        ({"num_classes": 10**12}, ["hatnet_tiny", 10, 10**12]),
        ({"mlp_ratios": [10**12] * 4}, ["hatnet_tiny", 10]),
    ],
)
def test_a_description_of_a_giant_is_refused_without_its_memory(change, named, checkpoint, tmp_path):
    path = tmp_path / "m.safetensors"
    record = read_metadata(checkpoint)
    record["config"] |= change
    save_file(load_file(checkpoint), path, {"hatnet": json.dumps(record)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with raises(ValueError, path, *named):
        load_classifier(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**19  # KiB: half a GiB
