import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hatnet_core.commands import SHARED
from hatnet_train import TrainConfig
from hatnet_train.cli import (
    evaluate,
    evaluate_parser,
    predict,
    predict_parser,
    shards,
    shards_parser,
    train,
    train_parser,
)
from hatnet_train.data.folder import Folder
from hatnet_train.parser import GRACE_SECONDS


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


WRONG = [
    (train, "", 2, "the following arguments are required: --recipe, --out"),
    (train, "--recipe digits", 2, "the following arguments are required: --out"),
    (
        train,
        "--recipe imagnet --out run",
        2,
        "invalid choice: 'imagnet', did you mean imagenet? (choose from digits, ",
    ),
    (train, "--recipe digits --out run --lr 1e400", 2, "--lr must be positive and finite, got inf"),
    (train, "--recipe digits --out run --varaint x", 2, "unknown argument '--varaint', did you mean --variant?"),
    (train, "--recipe digits --out run --image-size 24", 2, "--image-size must be from 32 to 2048 pixels, got 24"),
    (train, "--recipe digits --out run --epochs many", 2, "argument --epochs: 'many' is not a whole number"),
    (train, "--recipe digits --out run --epochs -1", 2, "--epochs must be from 1 to 1000000, got -1"),
    (train, "--recipe digits --out run --lr fast", 2, "argument --lr: 'fast' is not a number"),
    (train, "--recipe digits --out run --lr nan", 2, "--lr must be positive and finite, got nan"),
    (train, "--recipe digits --out run --variant hatnet_huge", 2, "invalid choice: 'hatnet_huge'"),
    (train, "--recipe digits --out run --precision int8", 2, "invalid choice: 'int8' (choose from bf16, fp16, fp32)"),
    (train, "--recipe digits --out run --zero-stage 4", 2, "invalid choice: 4 (choose from 0, 1, 2, 3)"),
    (train, "--recipe digits --out run --grid-sizes 8 8", 2, "argument --grid-sizes: expected 3 arguments"),
    (train, "--recipe digits --out run --preempt-seconds 0", 2, "'0' is not a number above 0"),
    (train, "--recipe imagenet --out run", 2, "recipe imagenet needs --data: an ImageNet-layout folder"),
    (train, "--recipe digits --preflight --print-config", 2, "not allowed with argument --preflight"),
    (
        train,
        "--recipe digits --out run --deepspeed_config ds.json --batch-size 32",
        2,
        "--batch-size 32 contradicts ds.",
    ),
    (
        train,
        "--recipe digits --out run --deepspeed_config no.json",
        1,
        "no DeepSpeed configuration at no.json: ",
    ),
    (
        train,
        "--recipe digits --out run --deepspeed_config bad.json",
        1,
        "bad.json: train_batch_size must be at least 1, ",
    ),
    (
        train,
        "--recipe digits --out run --deepspeed_config typo.json",
        1,
        "typo.json: unknown key 'gradient_cliping', di",
    ),
    (
        train,
        "--recipe digits --out text.png",
        1,
        "--out must be a folder that can be made and written, got 'text.png'",
    ),
    (
        train,
        "--verify nowhere",
        1,
        "neither config.json nor checkpoints in nowhere; expected a run folder of hatnet-tr",
    ),
    (train, "--check-data", 2, "the following arguments are required: --data"),
    (train, "--recipe digits --out run --warmup-epochs 9", 2, "--warmup-epochs must be from 0 to below epochs=7, got"),
    (train, "--check-hostfile nowhere", 1, "cannot read hostfile nowhere: No such file or directory"),
    (evaluate, "--data digits", 2, "the following arguments are required: --checkpoint"),
    (evaluate, "--checkpoint w.safetensors", 2, "the following arguments are required: --data"),
    (
        evaluate,
        "--checkpoint w.safetensors --data digits --size 16",
        2,
        "'16' is not a whole number of pixels from 32 ",
    ),
    (
        evaluate,
        "--checkpoint w.safetensors --data digits --batch 0",
        2,
        "--batch: '0' is not a whole number from 1 up",
    ),
    (evaluate, "--checkpoint w.safetensors --data digits --batch-size 8", 2, "'--batch-size', did you mean --batch?"),
    (
        evaluate,
        "--checkpoint w.safetensors --data digits --workers -1",
        2,
        "'-1' is not a whole number from 0 to 1024",
    ),
    (
        evaluate,
        "--checkpoint w.safetensors --data digits --format xml",
        2,
        "invalid choice: 'xml' (choose from table, j",
    ),
    (evaluate, "--checkpoint w.safetensors --data digits --timeout never", 2, "'never' is not a number above 0"),
    (
        evaluate,
        "--checkpoint w.safetensors --data digits --out no/row.json",
        1,
        "exists and can be written, got 'no/row.",
    ),
    (predict, "--checkpoint w.safetensors", 2, "the following arguments are required: IMAGE"),
    (predict, "image.png --checkpoint w.safetensors --top-k 0", 2, "--top-k: '0' is not a whole number from 1 up"),
    (
        predict,
        "image.png --checkpoint w.safetensors --top-k 11",
        1,
        "--top-k must be from 1 to the 10 classes, got 11",
    ),
    (
        predict,
        "image.png --checkpoint w.safetensors --device cuda:77",
        1,
        "--device must be auto, cpu, or a GPU that is ",
    ),
    (
        predict,
        "image.png --checkpoint w.safetensors --variant hatnet_small",
        1,
        "--variant must be hatnet_tiny, as w.safetensors",
    ),
    (
        predict,
        "image.png --checkpoint w.safetensors --variant hatnet_smal",
        2,
        "'hatnet_smal', did you mean hatnet_smal",
    ),
    (
        predict,
        "image.png --checkpoint no.safetensors",
        1,
        "no checkpoint at no.safetensors: expected an existing file or",
    ),
    (predict, "image.png --checkpoint cut.safetensors", 1, "cut.safetensors is not a readable safetensors file"),
    (predict, "image.png --checkpoint text.png", 1, "text.png is not a checkpoint of plain tensors"),
    (predict, "image.png --checkpoint huge.safetensors", 1, "expected hatnet_tiny with 900000000000 classes"),
    (predict, "image.png --checkpoint empty", 1, "empty holds no weights: expected model.safetensors, as in"),
    (predict, "image.png --checkpoint=", 2, "argument --checkpoint: '' is no path"),
    (predict, "no.png --checkpoint w.safetensors", 1, "no image at no.png: expected an existing file"),
    (
        predict,
        "text.png --checkpoint w.safetensors",
        1,
        "cannot read text.png as an image: its 6 bytes are of no known f",
    ),
    (predict, "cut.png --checkpoint w.safetensors", 1, "cannot read cut.png as an image"),
    (predict, "empty --checkpoint w.safetensors", 1, "folder empty holds no images: expected files that end in .apng"),
    (shards, "empty", 2, "one of the arguments --out --verify is required"),
    (shards, "empty --verify --resize 64", 2, "--resize has an effect only with --out, got 64"),
    (shards, "empty --out made --verify", 2, "argument --verify: not allowed with argument --out"),
    (shards, "empty --out made --resize 31", 2, "'31' is not a whole number of pixels from 32 up"),
    (shards, "empty --out made --quality 80", 2, "--quality has an effect only with --resize, got 80"),
    (shards, "empty --out made --resize 32 --quality 101", 2, "'101' is not a whole number from 1 to 100"),
    (shards, "empty --out made --shard-megabytes 0", 2, "'0' is not a number above 0"),
    (shards, "nowhere --out made", 1, "nowhere: train/ is missing; expected train/ and val/ with "),
    (shards, "empty --out made", 1, "empty: train/ is missing; expected train/ and val/ with "),
    (shards, "empty --out text.png", 1, "--out must be a folder that can be made and written, got 'text.png'"),
    (shards, "empty --verify", 1, "empty"),
]
"""Commands with arguments that are wrong, their exit statuses, and what is said."""


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """The folder in which the wrong commands are tried."""
    folder = tmp_path_factory.mktemp("files")
    content = checkpoint.read_bytes()
    (folder / "w.safetensors").write_bytes(content)
    (folder / "cut.safetensors").write_bytes(content[:100_000])
    with safe_open(checkpoint, "pt") as file:
        record = json.loads(file.metadata()["hatnet"])
    record["config"]["num_classes"] = 900_000_000_000
    save_file(load_file(checkpoint), folder / "huge.safetensors", {"hatnet": json.dumps(record)})
    Image.linear_gradient("L").save(folder / "image.png")
    (folder / "cut.png").write_bytes((folder / "image.png").read_bytes()[:100])
    (folder / "text.png").write_text("<html>")
    (folder / "empty").mkdir()
    for name, value in (("ds", {"train_batch_size": 64}), ("bad", {"train_batch_size": -8})):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "typo.json").write_text('{"gradient_cliping": 1.0}')
    return folder


@pytest.mark.parametrize(("command", "line", "expected", "message"), WRONG)
def test_wrong_input_is_one_line_and_a_status_and_leaves_nothing(
    command, line, expected, message, files, monkeypatch, capsys
):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    assert status(command, line.split()) == expected
    error = one_error_line(capsys)
    assert error.startswith("hatnet-")
    assert ": error: " in error
    assert message in error
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1",
            "lost contact with another pro",
        ),
        ("DataLoader worker (pid 23550) is killed by signal: Killed. ", "a worker was killed (out of memory?)"),
        ("CUDA out of memory. Tried to allocate 2 GiB", "not enough memory (CUDA out of memory. Tried to "),
    ],
)
def test_what_happens_to_a_machine_is_told_in_one_line_and_a_mistake_of_ours_is_shown(text, expected, capsys):
    def fail(message):
        raise RuntimeError(message)

    assert predict_parser().run(lambda options: fail(text), ["a", "--checkpoint", "b"]) == 1
    assert f"hatnet-predict: error: {expected}" in one_error_line(capsys)
    assert predict_parser().run(lambda options: fail("shape mismatch"), ["a", "--checkpoint", "b"]) == 1
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last.startswith("hatnet-predict: error: RuntimeError: shape mismatch")


@pytest.mark.parametrize("command", ["train", "eval", "predict", "shards"])
def test_the_installed_commands_refuse_a_wrong_option_before_torch_is_imported(command, run_command):
    code = "import sys\nfrom importlib.metadata import entry_points\nsys.argv = ['x', '--absent']\ntry:\n    "
    code += f"entry_points(name='hatnet-{command}')['hatnet-{command}'].load()()\nfinally:\n    "
    code += "print('torch' in sys.modules)"
    done = run_command(sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith(f"hatnet-{command}: error: ")
    assert done.stderr.count("\n") == 1
    installed = run_command(f"hatnet-{command}", "--absent")
    assert (installed.returncode, installed.stderr) == (2, done.stderr)


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
    assert "--rand-augment must be a policy of timm such as rand-m9-mstd0.5, got 'bogus'" in one_error_line(capsys)


def test_deepspeeds_json_goes_before_the_recipe_and_must_not_contradict_a_flag(tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}}')
    run = ["--recipe", "digits", "--print-config", "--deepspeed", "--deepspeed_config", file]
    assert status(train, [*run, "--zero-stage", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["batch_size"], printed["zero_stage"]) == (64, 2)
    assert status(train, [*run, "--batch-size", "32"]) == 2
    assert f"--batch-size 32 contradicts {file}, which gives 64: leave one out" in one_error_line(capsys)


def test_other_ranks_report_late_and_under_their_number(tmp_path, capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    assert status(train, ["--recipe", "imagnet", "--out", tmp_path]) != 0
    assert one_error_line(capsys).startswith(
        "hatnet-train: error: [rank 1] argument --recipe: invalid choice: 'imagnet'"
    )
    assert waits == [GRACE_SECONDS]


def test_predictions_come_as_a_table_or_as_json(checkpoint, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.new("L", (8, 8)).save(image)
    assert status(predict, ["--checkpoint", checkpoint, image, "--top-k", "2"]) == 0
    assert capsys.readouterr().out.count(" %") == 2
    assert status(predict, ["--checkpoint", checkpoint, image, "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["image"] == str(image)
    assert len(row["classes"]) == len(row["probabilities"]) == 1


@pytest.fixture
def damaged(files, tmp_path):
    """An image folder of two classes, in each split of which one image cannot be read."""
    for split, count in (("train", 3), ("val", 2)):
        for name, colour in (("0", "red"), ("1", "blue")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40 + i, 50 + count), colour).save(tmp_path / "data" / split / name / f"{i}.png")
        (tmp_path / "data" / split / "0" / "bad.png").write_bytes((files / "cut.png").read_bytes())
    return tmp_path / "data"


@pytest.mark.parametrize(("on_bad_image", "expected", "kind"), [("strict", 1, "error"), ("replace", 0, "warning")])
def test_an_image_that_cannot_be_read_is_named_and_does_not_cost_the_other_predictions(
    on_bad_image, expected, kind, checkpoint, damaged, capsys
):
    line = ["--checkpoint", checkpoint, damaged / "train", "--on-bad-image", on_bad_image]
    for output in ("table", "json"):
        assert status(predict, [*line, "--format", output]) == expected
        captured = capsys.readouterr()
        rows = json.loads(captured.out) if output == "json" else captured.out.splitlines()
        assert len(rows) == 6
        (problem,) = captured.err.splitlines()
        assert problem.startswith(f"hatnet-predict: {kind}: ")
        assert str(damaged / "train" / "0" / "bad.png") in problem


@pytest.mark.parametrize(("on_bad_image", "expected", "kind"), [("strict", 1, "error"), ("replace", 0, "warning")])
def test_an_image_that_cannot_be_read_is_named_and_does_not_cost_the_other_shards(
    on_bad_image, expected, kind, damaged, tmp_path, capsys
):
    line = [damaged, "--out", tmp_path / "shards", "--workers", "0", "--on-bad-image", on_bad_image]
    assert status(shards, line) == expected
    captured = capsys.readouterr()
    assert [text.split()[:2] for text in captured.out.splitlines()] == [["train:", "6"], ["val:", "4"]]
    assert [text.startswith(f"hatnet-shards: {kind}: ") for text in captured.err.splitlines()] == [True, True]
    assert status(shards, ["--verify", tmp_path / "shards"]) == 0


def test_no_prediction_at_all_is_a_failure_even_where_bad_images_are_only_warnings(checkpoint, damaged):
    bad = damaged / "train" / "0" / "bad.png"
    assert status(predict, ["--checkpoint", checkpoint, bad, "--on-bad-image", "replace"]) == 1


def test_check_data_counts_the_images_of_each_class_and_prints_every_problem(damaged, capsys):
    (damaged / "val" / "1" / "twin.png").write_bytes((damaged / "train" / "1" / "2.png").read_bytes())
    (damaged / "train" / "2").mkdir()
    (damaged / "val" / "other").mkdir()
    (damaged / "val" / "other" / "x.png").write_bytes((damaged / "train" / "1" / "2.png").read_bytes())
    (damaged / "train" / "0" / "notes.txt").touch()
    for workers in "02":
        assert status(train, ["--check-data", "--data", damaged, "--workers", workers]) == 1
        captured = capsys.readouterr()
        lines = [line.split() for line in captured.out.splitlines()]
        counts = [["0", "4", "3"], ["1", "3", "3"], ["2", "0", "0"], ["all", "7", "6"]]
        assert lines[:5] == [["class", "train", "val"], *counts]
        assert "train/0/notes.txt" in captured.out
        for named in ("train/2 ", "other", "train/0/bad.png", "val/0/bad.png"):
            assert sum(named in line for line in captured.out.splitlines()) == 1, named
        (twins,) = [line for line in captured.out.splitlines() if "twin.png" in line]
        assert str(damaged / "train" / "1" / "2.png") in twins
        (error,) = captured.err.splitlines()
        assert f"error: {damaged}: 5 problem" in error


def test_check_data_takes_shards_and_the_data_of_a_recipe(made, capsys):
    assert status(train, ["--check-data", "--data", made, "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["all", "20", "14"]
    assert status(train, ["--check-data", "--recipe", "digits"]) == 0
    assert capsys.readouterr().out.splitlines()[-2].split() == ["all", "1,437", "360"]


def test_a_file_that_cannot_be_opened_for_want_of_descriptors_is_not_taken_for_a_bad_image(damaged, tmp_path):
    source = Folder(damaged / "train")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        with pytest.raises(OSError, match="Too many open files"):
            source.image(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_shards_are_written_and_verified(tmp_path, capsys):
    for split, name in [("train", "a"), ("train", "b"), ("val", "b")]:
        (tmp_path / "data" / split / name).mkdir(parents=True)
        Image.new("RGB", (40, 50), "red").save(tmp_path / "data" / split / name / "x.png")
    out = tmp_path / "shards"
    assert status(shards, [tmp_path / "data", "--out", out, "--resize", "32", "--workers", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("train: 2 images in 1 shard, ")
    assert status(shards, ["--verify", out]) == 0
    assert capsys.readouterr().out == f"{out}: all shards are as they were written\n"
    assert status(shards, [tmp_path / "data", "--out", out, "--workers", "0"]) == 1
    assert str(out) in one_error_line(capsys)


@pytest.mark.parametrize("command", [train, evaluate, predict, shards])
def test_help_shows_an_example_and_every_default_and_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert status(command, ["--help"]) == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert "(default" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "digits: 7, imagenet: 300)" in text or command is not train


def test_options_that_all_commands_share_have_their_one_form():
    parsers = [train_parser(), evaluate_parser(), predict_parser(), shards_parser()]
    for one in parsers:
        for action in one._actions:
            for option in SHARED.keys() & set(action.option_strings):
                assert action.help.startswith(SHARED[option]), f"{one.prog} {option}: {action.help}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("hatnet-train --recipe imag", "imagenet"),
        ("hatnet-eval --che", "--checkpoint"),
        ("hatnet-predict --device c", "cpu"),
        ("hatnet-shards --ver", "--verify"),
    ],
)
def test_a_shell_is_told_what_completes_a_line(line, expected):
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " ", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = Path(sys.executable).with_name(line.partition(" ")[0])
    answer = subprocess.run(  # the answer is written to descriptor 8
        ["bash", "-c", f"{command} 8>&1 >/dev/null 2>&1"],
        env={**os.environ, **asked},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert expected in answer.stdout.split()
