"""hatnet-eval on part of the classes, and the page and the CSV file that it writes."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from hatnet_core import create_model
from hatnet_testing import error_line
from hatnet_train.classifier import load_classifier
from hatnet_train.data.images import read_image
from hatnet_train.page import imagenet_synsets


def draw(root, classes, number=3):
    """Class folders of noise."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / name / f"{i}.png")


def run(train, folder, *arguments, ranks=1, expected=0):
    out = [folder / name for name in ("row.json", "page.html", "classes.csv")]
    outputs = ["--out", out[0], "--page", out[1], "--per-class", out[2]]
    text = train("--workers", "0", *arguments, *outputs, ranks=ranks, function="evaluate", expected=expected)
    if expected:
        return text, out
    with out[2].open(newline="") as file:
        return json.loads(out[0].read_text()), list(csv.DictReader(file)), out[1].read_text()


def logits(checkpoint, files, variant=None):
    """Run the model on each image, one at a time."""
    classifier = load_classifier(checkpoint, variant)
    with torch.no_grad():
        return torch.cat([classifier.model(classifier.preprocess(read_image(file))[None]) for file in files])


def test_class_folders_of_a_part_of_the_classes_are_evaluated_among_all_or_among_themselves(
    train, checkpoint, tmp_path
):
    draw(tmp_path / "hard", ["3", "7"])
    files = sorted((tmp_path / "hard").glob("*/*.png"))
    given = logits(checkpoint, files)
    labels = torch.tensor([int(file.parent.name) for file in files])
    among_all = given.argmax(1)
    among_two = torch.tensor([3, 7])[given[:, [3, 7]].argmax(1)]
    for choice, predicted in (("all", among_all), ("present", among_two)):
        arguments = ["--checkpoint", checkpoint, "--data", tmp_path / "hard", "--classes", choice]
        row, classes, page = run(train, tmp_path, *arguments, ranks=2 if choice == "present" else 1)
        assert row["classes"] == (10 if choice == "all" else 2)
        assert row["images"] == 6
        assert row["top1"] == pytest.approx(100 * (predicted == labels).float().mean().item())
        assert [int(line["predicted"]) for line in classes] == torch.bincount(predicted, minlength=10).tolist()
        assert [line["class"] for line in classes if line["images"] != "0"] == ["3", "7"]
        assert "8 of 10 classes" in page


def test_a_val_without_some_classes_has_all_in_the_csv(train, checkpoint, tmp_path):
    draw(tmp_path / "data" / "val", ["0", "1", "9"], number=2)
    row, classes, _ = run(train, tmp_path, "--checkpoint", checkpoint, "--data", tmp_path / "data")
    assert (row["images"], row["classes"]) == (6, 10)
    assert [line["class"] for line in classes] == [str(i) for i in range(10)]
    assert sum(int(line["correct"]) for line in classes) == round(row["top1"] * 6 / 100)


def test_synsets_are_matched_with_released_weights_by_name(train, tmp_path):
    synsets = [*imagenet_synsets()]
    torch.manual_seed(0)
    model = create_model("hatnet_tiny").eval()
    torch.save(model.state_dict(), tmp_path / "released.pth")
    draw(tmp_path / "imagenet-r", [synsets[5], synsets[998]], number=2)
    files = sorted((tmp_path / "imagenet-r").glob("*/*.png"))
    arguments = ["--checkpoint", tmp_path / "released.pth", "--variant", "hatnet_tiny", "--classes", "present"]
    row, classes, _ = run(train, tmp_path, *arguments, "--data", tmp_path / "imagenet-r", "--size", "32")
    assert (row["images"], row["classes"], len(classes)) == (4, 2, 1000)
    assert [line["class"] for line in classes if line["images"] != "0"] == [synsets[5], synsets[998]]
    # the loss of two classes of almost equal logits
    assert row["loss"] == pytest.approx(np.log(2), abs=0.5)
    assert len(files) == 4


def test_folders_of_other_classes_are_refused_and_nothing_is_written(train, checkpoint, tmp_path):
    draw(tmp_path / "hard", ["3", "zebra"])
    text, out = run(train, tmp_path, "--checkpoint", checkpoint, "--data", tmp_path / "hard", expected=1)
    error_line(text, "hatnet-eval", "zebra", tmp_path / "hard")
    assert not any(path.exists() for path in out)
    shutil.rmtree(tmp_path / "hard" / "3")
    text, _ = run(train, tmp_path, "--checkpoint", checkpoint, "--data", tmp_path / "hard", expected=1)
    error_line(text, "hatnet-eval", tmp_path / "hard", "val/")
