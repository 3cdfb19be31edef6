import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from hatnet_core import HATNet, create_model, load_checkpoint, read_metadata, save_checkpoint
from hatnet_train.data import Digits, preprocess
from hatnet_train.predict import predict


@pytest.fixture
def scans(tmp_path):
    """35 held-out scans as PNG files: more than one batch."""
    paths = []
    for i, scan in enumerate(Digits(train=False, size=32).scans[:35]):
        paths.append(tmp_path / f"{i}.png")
        scan.save(paths[-1])
    return paths


def test_predictions_are_the_softmax_of_the_model_best_first(checkpoint, scans):
    rows = predict(checkpoint, scans, top_k=10)
    model = HATNet(**read_metadata(checkpoint)["config"]).eval()
    load_checkpoint(model, checkpoint)
    held_out = Digits(train=False, size=32)
    with torch.no_grad():
        expected = model(torch.stack([preprocess(scan, 32) for scan in held_out.scans[:35]])).softmax(-1)
    assert [row["image"] for row in rows] == [str(path) for path in scans]
    for row, probabilities in zip(rows, expected.tolist(), strict=True):
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
        by_class = dict(zip(row["classes"], row["probabilities"], strict=True))
        assert by_class == pytest.approx({str(i): p for i, p in enumerate(probabilities)}, rel=1e-4)


@pytest.mark.parametrize("top_k", [0, 11])
def test_more_or_fewer_classes_than_there_are_are_refused(checkpoint, scans, top_k):
    with pytest.raises(ValueError, match=f"top-k must be from 1 to the 10 classes, got {top_k}"):
        predict(checkpoint, scans, top_k)


def test_a_checkpoint_without_class_names_is_refused(tmp_path, scans):
    save_checkpoint(create_model("hatnet_tiny", num_classes=2), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"m\.safetensors has no usable classes, image_size, mean, std; expected"):
        predict(tmp_path / "m.safetensors", scans)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"classes": ["a"] * 9}, "has no usable classes"),
        ({"classes": ["a"] * 11}, "has no usable classes"),
        ({"image_size": 16}, "has no usable image_size"),
        ({"image_size": True}, "has no usable image_size"),
        ({"std": 0.0}, "has no usable std"),
        ({"config": {"zz": 1}}, "holds a configuration that builds no HAT-Net"),
        ({"config": {"embed_dims": 5, "depths": 5}}, "holds a configuration that builds no HAT-Net"),
    ],
)
def test_a_record_that_does_not_fit_the_weights_is_refused_by_path(record, message, checkpoint, tmp_path, scans):
    path = tmp_path / "m.safetensors"
    header = {"hatnet": json.dumps({**read_metadata(checkpoint), **record})}
    save_file(load_file(checkpoint), path, header)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} {message}"):
        predict(path, scans)


def test_a_checkpoint_whose_weights_are_of_another_model_is_refused(checkpoint, tmp_path, scans):
    from safetensors import safe_open

    with safe_open(checkpoint, "pt") as file:
        header = file.metadata()
    save_file(create_model("hatnet_small", num_classes=10).state_dict(), tmp_path / "m.safetensors", header)
    with pytest.raises(ValueError, match="holds hatnet_small with 10 classes; expected hatnet_tiny with 10 classes"):
        predict(tmp_path / "m.safetensors", scans)
