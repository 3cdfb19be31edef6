import pytest
import torch
from PIL import Image

from hatnet_core import HATNet, load_checkpoint, read_metadata
from hatnet_testing import raises
from hatnet_train.classifier import load_classifier
from hatnet_train.data.augment import centre_crop, normalise
from hatnet_train.data.source import Digits
from hatnet_train.predict import find_images, predict, predictions


@pytest.fixture
def scans(tmp_path):
    """35 held-out scans as PNG files: more than one batch."""
    paths = []
    for i, scan in enumerate(Digits(train=False).scans[:35]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(scan).save(paths[-1])
    return paths


def test_predictions_are_the_softmax_of_the_model_best_first(checkpoint, scans):
    rows = predict(load_classifier(checkpoint), scans, top_k=10)
    model = HATNet(**read_metadata(checkpoint)["config"]).eval()
    load_checkpoint(model, checkpoint)
    held_out = Digits(train=False)
    with torch.no_grad():
        images = torch.stack([centre_crop(held_out.image(i), 32, 1.0) for i in range(35)])
        expected = model(normalise(images)).softmax(-1)
    assert [row["image"] for row in rows] == [str(path) for path in scans]
    for row, probabilities in zip(rows, expected.tolist(), strict=True):
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
        by_class = dict(zip(row["classes"], row["probabilities"], strict=True))
        assert by_class == pytest.approx({str(i): p for i, p in enumerate(probabilities)}, rel=1e-4)


def test_a_folder_stands_for_the_images_in_it_and_below(checkpoint, scans):
    folder = scans[0].parent
    (folder / "below").mkdir()
    scans[9].rename(folder / "below" / "9.PNG")
    (folder / "notes.txt").write_text("no image")
    rows = predict(load_classifier(checkpoint), [folder])
    assert [row["image"] for row in rows] == sorted(
        str(file) for file in folder.rglob("*") if file.suffix in (".png", ".PNG")
    )
    assert len(rows) == 35


def test_hidden_folders_and_what_is_no_image_are_skipped_and_counted(scans):
    folder = scans[0].parent
    for name in (".ipynb_checkpoints", "below/.cache"):
        (folder / name).mkdir(parents=True)
        (folder / name / "hidden.png").write_bytes(scans[0].read_bytes())
    (folder / "notes.txt").write_text("no image")
    files, skipped = find_images([folder, scans[3]])
    assert files == sorted(scans)
    assert (skipped.files, skipped.folders) == (1, 2)


def test_images_that_cannot_be_read_do_not_cost_the_results_of_others(checkpoint, scans):
    (scans[1]).write_bytes(b"no image")
    missing, bad = scans[0].with_name("missing.png"), []
    rows = predictions(load_classifier(checkpoint), [*scans[:3], missing, *scans[3:]], on_bad=bad.append)
    assert [row["image"] for row in rows] == [str(path) for path in (scans[0], *scans[2:])]
    assert [str(path) in problem for path, problem in zip((scans[1], missing), bad, strict=True)] == [True, True]


@pytest.mark.parametrize("top_k", [0, 11])
def test_more_or_fewer_classes_than_there_are_are_refused(top_k, checkpoint, scans):
    with raises(ValueError, "top_k", 1, 10, top_k):
        predict(load_classifier(checkpoint), scans, top_k)


@pytest.mark.parametrize("device", ["gpu9", "cuda:77", "meta:x"])
def test_a_device_that_is_not_there_is_refused(device, checkpoint, scans):
    with raises(ValueError, "device", "cpu", repr(device)):
        predict(load_classifier(checkpoint), scans, device=device)
