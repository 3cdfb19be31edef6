import json

import pytest
from PIL import Image

from hatnet_train.cli import GRACE_SECONDS, predict, train


def one_error_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def status(command, arguments):
    """Exit status of a command called in this process."""
    try:
        return command([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "imagnet"], "unknown recipe 'imagnet'; known recipes: digits"),
        (["--recipe", "digits", "--varaint", "x"], "unrecognized arguments: --varaint x"),
        (["--recipe", "digits", "--image-size", "24"], "image_size must be from 32 to 2048 pixels, got 24"),
        (["--recipe", "digits", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--recipe", "digits", "--variant", "hatnet_huge"], "got hatnet_huge"),
        ([], "the following arguments are required: --recipe"),
    ],
)
def test_wrong_training_arguments_end_with_one_line_and_make_no_folder(arguments, expected, tmp_path, capsys):
    assert status(train, [*arguments, "--out", tmp_path / "run"]) != 0
    line = one_error_line(capsys)
    assert line.startswith("hatnet-train: error: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_other_ranks_report_late_and_under_their_number(tmp_path, capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    assert status(train, ["--recipe", "imagnet", "--out", tmp_path]) != 0
    assert one_error_line(capsys).startswith("hatnet-train: error: [rank 1] unknown recipe 'imagnet'")
    assert waits == [GRACE_SECONDS]


@pytest.mark.parametrize("broken", ["missing image", "unreadable image", "missing checkpoint", "corrupt checkpoint"])
def test_wrong_files_end_the_prediction_with_one_line_that_names_them(broken, checkpoint, tmp_path, capsys):
    image = tmp_path / "image.png"
    weights = checkpoint
    if broken == "unreadable image":
        image.write_bytes(b"not an image")
    elif broken != "missing image":
        Image.new("L", (8, 8)).save(image)
        weights = tmp_path / "model.safetensors"
        if broken == "corrupt checkpoint":
            weights.write_bytes(checkpoint.read_bytes()[:10_000])
    assert status(predict, ["--checkpoint", weights, image]) != 0
    line = one_error_line(capsys)
    assert line.startswith("hatnet-predict: error: ")
    assert str(image if "image" in broken else weights) in line


def test_predictions_come_as_a_table_or_as_json(checkpoint, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)
    assert status(predict, ["--checkpoint", checkpoint, image, "--top-k", "2"]) == 0
    assert capsys.readouterr().out.count(" %") == 2
    assert status(predict, ["--checkpoint", checkpoint, image, "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["image"] == str(image)
    assert len(row["classes"]) == len(row["probabilities"]) == 1


@pytest.mark.parametrize("command", [train, predict])
def test_help_shows_an_example_and_every_default(command, capsys):
    assert status(command, ["--help"]) == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert "(default table)" in text or "(digits: 7)" in text
