import dataclasses
import json

import pytest
from PIL import Image

from hatnet_train import TrainConfig
from hatnet_train.cli import GRACE_SECONDS, _report_errors, evaluate, predict, shards, train


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
        (["--recipe", "imagnet"], "unknown recipe 'imagnet'; known recipes: digits, imagenet"),
        (["--recipe", "digits", "--varaint", "x"], "unrecognized arguments: --varaint x"),
        (["--recipe", "digits", "--image-size", "24"], "image_size must be from 32 to 2048 pixels, got 24"),
        (["--recipe", "digits", "--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--recipe", "digits", "--variant", "hatnet_huge"], "got hatnet_huge"),
        (["--recipe", "imagenet"], "recipe imagenet needs --data: digits, synthetic, or the path of"),
        (["--recipe", "digits", "--grid-sizes", "8", "8"], "argument --grid-sizes: expected 3 arguments"),
        (["--recipe", "digits", "--deepspeed_config", "no.json"], "no DeepSpeed configuration at no.json: expected"),
        ([], "the following arguments are required: --recipe"),
    ],
)
def test_wrong_training_arguments_end_with_one_line_and_make_no_folder(arguments, expected, tmp_path, capsys):
    assert status(train, [*arguments, "--out", tmp_path / "run"]) != 0
    line = one_error_line(capsys)
    assert line.startswith("hatnet-train: error: ")
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_folder_is_refused(capsys):
    assert status(train, ["--recipe", "digits"]) == 2
    assert "the following arguments are required: --out" in one_error_line(capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1",
            "lost contact with another pro",
        ),
        ("DataLoader worker (pid 23550) is killed by signal: Killed. ", "a data worker was killed from outside"),
        ("CUDA out of memory. Tried to allocate 2 GiB", "not enough memory; --accumulation"),
    ],
)
def test_what_happens_to_a_machine_is_told_in_one_line_and_a_mistake_of_ours_is_not_hidden(text, expected, capsys):
    def fail(message):
        raise RuntimeError(message)

    assert _report_errors("hatnet-train", lambda: fail(text)) == 1
    assert f"hatnet-train: error: {expected}" in one_error_line(capsys)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        _report_errors("hatnet-train", lambda: fail("shape mismatch"))


def test_a_result_that_could_not_be_written_is_refused_before_the_work(tmp_path, capsys):
    result = tmp_path / "nowhere" / "row.json"
    assert status(evaluate, ["--checkpoint", "x.safetensors", "--data", "digits", "--out", result]) == 1
    assert f"--out must be a file in a folder that exists, got {result}" in one_error_line(capsys)


def test_a_hostfile_is_looked_up_without_a_launch(tmp_path, capsys):
    file = tmp_path / "hosts"
    file.write_text("localhost slots=4\n127.0.0.1 slots=2\n")
    assert status(train, ["--check-hostfile", file]) == 0
    assert capsys.readouterr().out == f"{file}: 2 hosts, 6 processes, all names resolve\n"
    file.write_text("localhost slots=4\nno-such-host.invalid slots=4\n")
    assert status(train, ["--check-hostfile", file]) == 1
    line = one_error_line(capsys)
    assert f"hostfile {file}: host no-such-host.invalid does not resolve" in line


def test_the_configuration_is_printed_with_every_field_and_what_was_given(capsys):
    flags = ["--data", "x", "--pool-sizes", "16", "8", "4", "--compile", "--mixup", "0.2"]
    assert status(train, ["--recipe", "imagenet", "--print-config", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    given = {"data": "x", "pool_sizes": [16, 8, 4], "compile": True, "mixup": 0.2, "epochs": 300, "zero_stage": 0}
    assert {name: printed[name] for name in given} == given


def test_a_configuration_is_printed_only_if_timm_knows_its_policy(capsys):
    assert status(train, ["--recipe", "digits", "--print-config", "--rand-augment", "bogus"]) == 1
    assert "rand_augment must be a policy of timm such as rand-m9-mstd0.5, got 'bogus'" in one_error_line(capsys)


def test_deepspeeds_json_goes_before_the_recipe_and_must_not_contradict_a_flag(tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}}')
    run = ["--recipe", "digits", "--print-config", "--deepspeed", "--deepspeed_config", file]
    assert status(train, [*run, "--zero-stage", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["batch_size"], printed["zero_stage"]) == (64, 2)
    assert status(train, [*run, "--batch-size", "32"]) == 1
    assert f"--batch-size 32 contradicts {file}, which gives 64: leave one out" in one_error_line(capsys)


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


def test_shards_are_written_and_verified(tmp_path, capsys):
    for split, name in [("train", "a"), ("train", "b"), ("val", "b")]:
        (tmp_path / "data" / split / name).mkdir(parents=True)
        Image.new("RGB", (40, 50), "red").save(tmp_path / "data" / split / name / "x.png")
    out = tmp_path / "shards"
    assert status(shards, [tmp_path / "data", out, "--resize", "32", "--workers", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("train: 2 images in 1 shards, ")
    assert status(shards, ["--verify", out]) == 0
    assert capsys.readouterr().out == f"{out}: all shards are as they were written\n"
    assert status(shards, [tmp_path / "data", out, "--workers", "0"]) == 1
    assert str(out) in one_error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data"], "the following arguments are required: OUT"),
        (["data", "out", "--verify"], "--verify takes DATA alone"),
        (["nowhere", "out", "--workers", "0"], "nowhere"),
        (["nowhere", "out", "--resize", "31", "--workers", "0"], "got 31"),
    ],
)
def test_wrong_arguments_of_shards_end_with_one_line(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status(shards, arguments) != 0
    line = one_error_line(capsys)
    assert line.startswith("hatnet-shards: error: ")
    assert expected in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [train, evaluate, predict, shards])
def test_help_shows_an_example_and_every_default(command, capsys):
    assert status(command, ["--help"]) == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert "(default" in text
    assert "digits: 7, imagenet: 300)" in text or command is not train
