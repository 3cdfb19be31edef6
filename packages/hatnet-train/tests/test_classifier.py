import json
import re
import resource

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hatnet_core import create_model, read_metadata, save_checkpoint
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
    with pytest.raises(
        ValueError, match=r"variant must be hatnet_tiny, as .*model\.safetensors says, .* got hatnet_small"
    ):
        load_classifier(checkpoint, "hatnet_small")


def test_weights_alone_need_the_variant_and_are_prepared_as_in_the_paper(tmp_path):
    model = create_model("hatnet_tiny", num_classes=7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not say which model it holds: name it with variant=NAME"):
        load_classifier(tmp_path / "weights.pth")
    classifier = load_classifier(tmp_path / "weights.pth", "hatnet_tiny")
    assert classifier.classes == [str(i) for i in range(7)]
    assert not classifier.named
    assert (classifier.image_size, classifier.crop_fraction, tuple(classifier.mean)) == (224, 0.875, MEAN)
    assert torch.equal(classifier.model.head.weight, model.head.weight)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.safetensors"):
        load_classifier(tmp_path / "nowhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere: expected an existing file or folder"):
        load_classifier(tmp_path / "nowhere")


def test_a_checkpoint_for_other_images_than_rgb_is_refused_by_path(tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=2, in_chans=1), tmp_path / "grey.safetensors")
    with pytest.raises(ValueError, match=r"grey\.safetensors holds a model of in_chans=1; expected 3, for RGB images"):
        load_classifier(tmp_path / "grey.safetensors")


def test_a_checkpoint_without_class_names_is_refused(tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=2), tmp_path / "m.safetensors")
    expected = r"m\.safetensors has no usable classes, image_size, crop_fraction, mean, std; expected a checkpoint"
    with pytest.raises(ValueError, match=expected):
        load_classifier(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"classes": ["a"] * 9}, "has no usable classes"),
        ({"classes": ["a"] * 11}, "has no usable classes"),
        ({"image_size": 16}, "has no usable image_size"),
        ({"image_size": True}, "has no usable image_size"),
        ({"image_size": 10**9}, "has no usable image_size"),
        ({"crop_fraction": 1.5}, "has no usable crop_fraction"),
        ({"mean": 0.5}, "has no usable mean"),
        ({"std": [0.1, 0.1, 0.0]}, "has no usable std"),
        ({"config": {"zz": 1}}, "holds a configuration that builds no HAT-Net"),
        ({"config": {"embed_dims": 5, "depths": 5}}, "holds a configuration that builds no HAT-Net"),
    ],
)
def test_a_record_that_does_not_fit_the_weights_is_refused_by_path(record, message, checkpoint, tmp_path):
    path = tmp_path / "m.safetensors"
    header = {"hatnet": json.dumps({**read_metadata(checkpoint), **record})}
    save_file(load_file(checkpoint), path, header)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {message}"):
        load_classifier(path)


def test_a_checkpoint_whose_weights_are_of_another_model_is_refused(checkpoint, tmp_path):
    with safe_open(checkpoint, "pt") as file:
        header = file.metadata()
    save_file(create_model("hatnet_small", num_classes=10).state_dict(), tmp_path / "m.safetensors", header)
    with pytest.raises(ValueError, match="holds hatnet_small with 10 classes; expected hatnet_tiny with 10 classes"):
        load_classifier(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": [10**9, 1, 1, 1]}, r"says that it holds 1000000003 blocks, but has no more than \d+ tensors"),
        (
            {"embed_dims": [10**6] * 4, "head_dim": 10**6},
            "holds hatnet_tiny with 10 classes; expected a HAT-Net of an",
        ),
        ({"num_classes": 10**12}, "expected hatnet_tiny with 1000000000000 classes"),
        ({"mlp_ratios": [10**12] * 4}, "m.safetensors holds "),
    ],
)
def test_a_description_of_a_giant_is_refused_without_its_memory(change, message, checkpoint, tmp_path):
    path = tmp_path / "m.safetensors"
    record = read_metadata(checkpoint)
    record["config"] |= change
    save_file(load_file(checkpoint), path, {"hatnet": json.dumps(record)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message):
        load_classifier(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**19  # KiB: half a GiB
