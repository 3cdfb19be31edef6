import errno
import json
import os
import re
import resource
import sys

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hatnet_testing import check, error_line, raises, usage_error
from hatnet_train.cli import MODES, evaluate, predict, shards, train
from hatnet_train.config import FIELDS, TrainConfig
from hatnet_train.data.folder import Folder
from hatnet_train.errors import GRACE_SECONDS
from hatnet_train.recipes import build_config
from image_folders import draw_coloured_images

NAMES = {train: "hatnet-train", evaluate: "hatnet-eval", predict: "hatnet-predict", shards: "hatnet-shards"}


def status(command, arguments):
    """Exit status of a command called in this process."""
    try:
        return command([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def refused(command, arguments, capsys, *named, expected=1):
    """Run a command that prints nothing but an error, which names everything in ``named``."""
    assert status(command, arguments) == expected
    captured = capsys.readouterr()
    assert captured.out == ""
    if expected == 2:
        usage_error(captured.err, *named)
    else:
        assert captured.err.count("\n") == 1, captured.err
        modes = [MODES[word] for word in arguments if word in MODES]
        error_line(captured.err, " ".join([NAMES[command], *modes]), *named)


TRAIN = "--recipe digits --out run"
EVALUATE = "--checkpoint w.safetensors --data digits"
PREDICT = "image.png --checkpoint w.safetensors"
SHARDS = "empty --out made"

USAGE = [
    (train, "", "--recipe --out"),
    (train, "--recipe digits", "--out"),
    (train, "--recipe imagnet --out run", "--recipe imagnet imagenet"),
    (train, "--recipe imagenet --out run", "--data"),
    (train, f"{TRAIN} --lr 1e400", "--lr inf"),
    (train, f"{TRAIN} --lr fast", "--lr fast"),
    (train, f"{TRAIN} --lr nan", "--lr nan"),
    (train, f"{TRAIN} --varaint x", "--varaint --variant"),
    (train, f"{TRAIN} --variant hatnet_huge", "--variant hatnet_huge"),
    (train, f"{TRAIN} --image-size 24", "--image-size 24 32 2048"),
    (train, f"{TRAIN} --epochs many", "--epochs many"),
    (train, f"{TRAIN} --epochs -1", "--epochs -1 1 1000000"),
    (train, f"{TRAIN} --warmup-epochs 9", "--warmup-epochs 9.0 7"),
    (train, f"{TRAIN} --precision int8", "--precision int8 bf16 fp16 fp32"),
    (train, f"{TRAIN} --zero-stage 4", "--zero-stage 4 0 1 2 3"),
    (train, f"{TRAIN} --grid-sizes 8 8", "--grid-sizes 3"),
    (train, f"{TRAIN} --preempt-seconds 0", "--preempt-seconds 0"),
    (train, f"{TRAIN} --deepspeed_config ds.json --batch-size 32", "--batch-size 32 ds.json 64"),
    (train, "--recipe digits --preflight --print-config", "--preflight --print-config"),
    (train, "--check-data", "--data"),
    (train, "--config run.json --recipe digits --out run", "--config --recipe digits"),
    (train, "--config run.json --out run --epochs 0", "--epochs 0 1"),
    (train, f"{TRAIN} --freeze head", "--freeze head none backbone"),
    (
        train,
        "--recipe finetune --data digits --init w.safetensors --variant hatnet_small --out run",
        "--variant hatnet_small hatnet_tiny w.safetensors",
    ),
    (train, f"{TRAIN} --layer-decay 0", "--layer-decay 0"),
    (evaluate, "--data digits", "--checkpoint"),
    (evaluate, "--checkpoint w.safetensors", "--data"),
    (evaluate, f"{EVALUATE} --size 16", "--size 16 32"),
    (evaluate, f"{EVALUATE} --batch 0", "--batch 0"),
    (evaluate, f"{EVALUATE} --batch-size 8", "--batch-size --batch"),
    (evaluate, f"{EVALUATE} --workers -1", "--workers -1 0 1024"),
    (evaluate, f"{EVALUATE} --page a.txt", "--page a.txt .html"),
    (evaluate, f"{EVALUATE} --per-class a.txt", "--per-class a.txt .csv"),
    (evaluate, f"{EVALUATE} --classes some", "--classes some all present"),
    (evaluate, f"{EVALUATE} --format xml", "--format xml table json"),
    (evaluate, f"{EVALUATE} --timeout never", "--timeout never"),
    (predict, "--checkpoint w.safetensors", "IMAGE"),
    (predict, f"{PREDICT} --top-k 0", "--top-k 0"),
    (predict, f"{PREDICT} --size 16", "--size 16 32"),
    (predict, f"{PREDICT} --batch 0", "--batch 0"),
    (predict, f"{PREDICT} --precision int8", "--precision int8 bf16"),
    (predict, f"{PREDICT} --out rows.txt", "--out rows.txt .csv .jsonl .html"),
    (predict, f"{PREDICT} --out rows.csv --format json", "--format json --out"),
    (predict, f"{PREDICT} --variant hatnet_smal", "--variant hatnet_smal hatnet_small"),
    (predict, "image.png --checkpoint=", "--checkpoint"),
    (shards, "empty", "--out"),
    (shards, "empty --verify --resize 64", "--resize"),
    (shards, f"{SHARDS} --verify", "--out"),
    (shards, "verifies empty", "verifies verify"),
    (train, "trains", "trains train"),
    (train, "check-data --data digits --image-size 64", "--image-size 64 synthetic"),
    (train, "config --recipe digits --rand-augment bogus", "--rand-augment bogus"),
    (predict, f"{PREDICT} --device tpu", "--device tpu"),
    (shards, f"{SHARDS} --resize 31", "--resize 31 32"),
    (shards, f"{SHARDS} --quality 80", "--quality 80 --resize"),
    (shards, f"{SHARDS} --resize 32 --quality 101", "--quality 101 1 100"),
    (shards, f"{SHARDS} --shard-megabytes 0", "--shard-megabytes 0"),
]
"""Wrong command lines, and what their errors have to name."""

FAILURES = [
    (train, f"{TRAIN} --deepspeed_config no.json", "no.json"),
    (train, f"{TRAIN} --deepspeed_config bad.json", "bad.json train_batch_size -8"),
    (train, f"{TRAIN} --deepspeed_config typo.json", "typo.json gradient_clipping"),
    (train, "--recipe digits --out text.png", "--out text.png"),
    (train, "--verify nowhere", "nowhere config.json"),
    (train, "--config nowhere.json --out run", "nowhere.json"),
    (train, "--config ds.json --out run", "ds.json config"),
    (train, "--recipe finetune --data nowhere --out run", "nowhere"),
    (train, "--recipe finetune --data empty --out run", "empty"),
    (train, "--recipe finetune --data empty --labels typo.json --out run", "typo.json file label"),
    (train, "--recipe finetune --data digits --init no.safetensors --out run", "no.safetensors"),
    (train, "--check-hostfile nowhere", "nowhere"),
    (evaluate, f"{EVALUATE} --out no/row.json", "--out no/row.json"),
    (evaluate, f"{EVALUATE} --page no/page.html", "--page no/page.html"),
    (evaluate, f"{EVALUATE} --per-class no/a.csv", "--per-class no/a.csv"),
    (predict, f"{PREDICT} --top-k 11", "--top-k 11 10"),
    (predict, f"{PREDICT} --device cuda:77", "--device cuda:77"),
    (predict, f"{PREDICT} --variant hatnet_small", "--variant hatnet_small hatnet_tiny w.safetensors"),
    (predict, "image.png --checkpoint no.safetensors", "no.safetensors"),
    (predict, "image.png --checkpoint cut.safetensors", "cut.safetensors"),
    (predict, "image.png --checkpoint text.png", "text.png"),
    (predict, "image.png --checkpoint huge.safetensors", "huge.safetensors hatnet_tiny 900000000000"),
    (predict, "image.png --checkpoint empty", "empty model.safetensors"),
    (predict, "no.png --checkpoint w.safetensors", "no.png"),
    (predict, "text.png --checkpoint w.safetensors", "text.png 6"),
    (predict, "cut.png --checkpoint w.safetensors", "cut.png"),
    (predict, "empty --checkpoint w.safetensors", "empty .apng"),
    (predict, "empty/*.png --checkpoint w.safetensors", "empty/*.png"),
    (predict, "image.png --checkpoint w.safetensors --out no/rows.csv", "--out no/rows.csv"),
    (shards, "nowhere --out made", "nowhere train/ val/"),
    (shards, "empty --out made", "empty train/ val/"),
    (shards, "empty --out text.png", "--out text.png"),
    (shards, "empty --verify", "empty/index.json"),
]
"""Right command lines that cannot be carried out, and what their errors have to name."""


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
    run = {"config": build_config("digits", {}).to_dict()}
    for name, value in (("ds", {"train_batch_size": 64}), ("bad", {"train_batch_size": -8}), ("run", run)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    (folder / "typo.json").write_text('{"gradient_clipping": "1"}')
    return folder


@pytest.mark.parametrize(
    ("command", "line", "named", "expected"), [*((*case, 2) for case in USAGE), *((*case, 1) for case in FAILURES)]
)
def test_wrong_input_is_a_short_error_and_a_status_and_leaves_nothing(
    command, line, named, expected, files, monkeypatch, capsys
):
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    refused(command, line.split(), capsys, *named.split(), expected=expected)
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1", ["10.0.0.2"]),
        ("DataLoader worker (pid 23550) is killed by signal: Killed. ", ["killed", "--workers"]),
        ("CUDA out of memory. Tried to allocate 2 GiB", ["CUDA out of memory", "--batch", "--workers"]),
    ],
)
def test_an_error_of_the_machine_is_one_line_and_a_mistake_of_ours_has_a_trace(text, named, capsys, monkeypatch):
    def run(message):
        def fail(options):
            raise RuntimeError(message)

        monkeypatch.setattr("hatnet_train.cli.Evaluate.run", fail)
        assert evaluate(["--checkpoint", "a", "--data", "b"]) == 1
        return capsys.readouterr().err

    error = run(text)
    error_line(error, "hatnet-eval", *named)
    assert error.count("\n") == 1
    trace = run("shape mismatch")
    assert trace.startswith("Traceback (most recent call last):\n")
    error_line(trace, "hatnet-eval", "RuntimeError", "shape mismatch")


@pytest.mark.parametrize("command", NAMES.values())
def test_the_installed_commands_refuse_a_wrong_option_before_torch_is_imported(command, run_command):
    words = ["--absent"] if command == "hatnet-train" else ["x", "--absent"]
    code = "import sys\nfrom importlib.metadata import entry_points\ntry:\n    "
    code += f"sys.exit(entry_points(name='{command}')['{command}'].load()())\nfinally:\n    "
    code += "print('torch' in sys.modules)"
    done = run_command(sys.executable, "-c", code, *words)
    assert (done.returncode, done.stdout) == (2, "False\n")
    usage_error(done.stderr, command, "--absent")
    installed = run_command(command, *words)
    assert (installed.returncode, installed.stderr) == (2, done.stderr)


def test_a_hostfile_is_looked_up_without_a_launch(tmp_path, capsys):
    file = tmp_path / "hosts"
    file.write_text("localhost slots=4\n127.0.0.1 slots=2\n")
    assert status(train, ["--check-hostfile", file]) == 0
    printed = capsys.readouterr().out
    check(printed, file)
    assert re.findall(r"\d+", printed.replace(str(file), "")) == ["2", "6"]  # hosts and processes
    file.write_text("localhost slots=4\nno-such-host.invalid slots=4\n")
    refused(train, ["--check-hostfile", file], capsys, file, "no-such-host.invalid")


def test_the_configuration_is_printed_with_every_field_and_what_was_given(capsys):
    flags = ["--data", "x", "--pool-sizes", "16", "8", "4", "--compile", "--mixup", "0.2"]
    assert status(train, ["--recipe", "imagenet", "--print-config", *flags]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == FIELDS.keys()
    given = {"data": "x", "pool_sizes": [16, 8, 4], "compile": True, "mixup": 0.2, "epochs": 300, "zero_stage": 0}
    assert {name: printed[name] for name in given} == given


def test_another_runs_values_are_taken_but_for_those_that_are_given(files, capsys):
    assert status(train, ["config", "--config", files / "run.json", "--epochs", "9", "--seed", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert TrainConfig.from_dict(printed) == build_config("digits", {"epochs": 9, "warmup_epochs": 2.1, "seed": 3})


def test_the_newest_values_of_a_resumed_run_are_taken(tmp_path, capsys):
    first, last = (build_config("digits", {"epochs": epochs}).to_dict() for epochs in (7, 9))
    (tmp_path / "config.json").write_text(json.dumps({"config": first, "resumed": [{"config": last}]}))
    assert status(train, ["config", "--config", tmp_path]) == 0
    assert json.loads(capsys.readouterr().out)["epochs"] == 9


def test_finetune_takes_model_and_size_of_its_weights_and_counts_the_images(checkpoint, tmp_path, capsys):
    draw_coloured_images(tmp_path, classes=2, train=40, val=2)
    line = ["config", "--recipe", "finetune", "--data", tmp_path, "--init", checkpoint]
    assert status(train, line) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["variant"], printed["image_size"]) == ("hatnet_tiny", 32)
    assert (printed["batch_size"], printed["epochs"]) == (8, 50)
    assert status(train, [*line, "--image-size", "64", "--batch-size", "20", "--epochs", "7"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["image_size"], printed["batch_size"], printed["epochs"]) == (64, 20, 7)
    assert printed["warmup_epochs"] == pytest.approx(0.7)


def test_deepspeeds_json_goes_before_the_recipe_and_must_not_contradict_a_flag(tmp_path, capsys):
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}}')
    run = ["--recipe", "digits", "--print-config", "--deepspeed", "--deepspeed_config", file]
    assert status(train, [*run, "--zero-stage", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["batch_size"], printed["zero_stage"]) == (64, 2)
    refused(train, [*run, "--batch-size", "32"], capsys, "--batch-size", 32, file, 64, expected=2)


def test_other_ranks_leave_a_wrong_command_line_to_rank_0(tmp_path, capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    for wrong in (["--recipe", "imagnet"], ["--recipe", "digits", "--epochs", "0"]):
        assert status(train, [*wrong, "--out", tmp_path]) == 2
        assert capsys.readouterr().err == ""
    assert waits == [GRACE_SECONDS] * 2


def test_other_ranks_report_an_error_late_and_under_their_number(capsys, monkeypatch):
    waits = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waits.append)
    refused(train, ["--verify", "nowhere"], capsys, "rank 1", "nowhere")
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
        problem, *total = captured.err.splitlines()
        assert problem.startswith(f"hatnet-predict: {kind}: ")
        assert [re.findall(r"\d+", line) for line in total] == ([["1", "7"]] if expected else [])
        assert str(damaged / "train" / "0" / "bad.png") in problem


@pytest.mark.parametrize(("on_bad_image", "expected", "kind"), [("strict", 1, "error"), ("replace", 0, "warning")])
def test_an_image_that_cannot_be_read_is_named_and_does_not_cost_the_other_shards(
    on_bad_image, expected, kind, damaged, tmp_path, capsys
):
    line = [damaged, "--out", tmp_path / "shards", "--workers", "0", "--on-bad-image", on_bad_image]
    assert status(shards, line) == expected
    captured = capsys.readouterr()
    assert re.findall(r"^(\w+)\D+(\d+)", captured.out, re.MULTILINE) == [("train", "6"), ("val", "4")]
    assert captured.err.count("\n") == captured.err.count(f"hatnet-shards: {kind}: ") == 2 + expected
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
        error = error_line(captured.err, "hatnet-train check-data", damaged)
        assert re.findall(r"\d+", error.replace(str(damaged), "")) == ["5"]


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
        with raises(OSError, os.strerror(errno.EMFILE)):
            source.image(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_shards_are_written_and_verified(tmp_path, capsys):
    for split, name in [("train", "a"), ("train", "b"), ("val", "b")]:
        (tmp_path / "data" / split / name).mkdir(parents=True)
        Image.new("RGB", (40, 50), "red").save(tmp_path / "data" / split / name / "x.png")
    out = tmp_path / "shards"
    assert status(shards, [tmp_path / "data", "--out", out, "--resize", "32", "--workers", "0"]) == 0
    assert re.findall(r"^(\w+)\D+(\d+)\D+(\d+)", capsys.readouterr().out, re.MULTILINE) == [
        ("train", "2", "1"),  # images and shards
        ("val", "1", "1"),
    ]
    assert status(shards, ["--verify", out]) == 0
    check(capsys.readouterr().out, out)
    refused(shards, [tmp_path / "data", "--out", out, "--workers", "0"], capsys, out)


@pytest.mark.parametrize("command", NAMES)
def test_help_shows_an_example_and_every_default_and_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert status(command, ["--help"]) == 0
    text = capsys.readouterr().out
    assert {"Examples", "default"} <= set(re.findall("Examples|default", text))
    assert all(len(line) <= 80 for line in text.splitlines() if re.match(r"[│ ]+--", line))
    if command is train:
        assert status(command, ["--recipe", "digits", "--help"]) == 0
        for shown, epochs in ((text, "300"), (capsys.readouterr().out, "7")):
            assert re.search(r"--epochs .*?default:\W+(\d+)", shown, re.DOTALL)[1] == epochs
