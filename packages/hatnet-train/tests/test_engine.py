"""Real runs: every way to launch hatnet-train, with real processes, must give the same training.

Where the launcher is not what is tested, the processes are forked from one that has all imports behind it.
"""

import csv
import json
import math
import os
import shutil
import subprocess

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from hatnet_core import create_model, save_checkpoint
from hatnet_testing import error_line
from hatnet_train.classifier import load_classifier
from hatnet_train.data.folder import Folder
from hatnet_train.deepspeed.engine import use_deterministic_algorithms
from image_folders import draw_coloured_images
from launches import BIN, ROOT, lines_naming, until

pytestmark = pytest.mark.long

MODULE = [BIN / "deepspeed", "--num_accelerators", "2", "--module", "hatnet_train"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageNet-layout folder of 4 classes that differ in colour: 120 images to train with, 40 held out."""
    root = tmp_path_factory.mktemp("images")
    draw_coloured_images(root, classes=4, train=30, val=10)
    return root


@pytest.fixture(scope="module")
def short(images):
    """Arguments of a run of 10 steps."""
    run = ["--epochs", "2", "--batch-size", "24", "--lr", "3e-4", "--seed", "5"]
    return ["--recipe", "digits", "--data", images, *run]


@pytest.fixture(scope="module")
def alone(run_command, tmp_path_factory, short):
    """The run folder of one process without a launcher."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = run_command(BIN / "hatnet-train", *short, "--out", out)
    assert done.returncode == 0, done.stderr
    assert lines_naming(done.stderr, "2/2", "images/s")
    return out


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(out, reference, *, rel, absolute=0.0, weights=1e-3):
    """Losses of two runs to ``rel`` or ``absolute``, final weights to a share of their norm."""
    for ours, theirs in zip(metrics(out), metrics(reference), strict=True):
        for name in ("train_loss", "eval_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=absolute)
        assert ours["lr"] == theirs["lr"]
    one, two = load_file(reference / "model.safetensors"), load_file(out / "model.safetensors")
    difference = sum((one[n] - two[n]).double().square().sum() for n in one).sqrt()
    assert difference < weights * sum(t.double().square().sum() for t in one.values()).sqrt()


def test_a_run_learns_and_leaves_everything_it_promises(alone):
    first, last = metrics(alone)
    assert last["eval_loss"] < first["eval_loss"] < math.log(4)
    assert last["top1"] > 50
    # 10 steps, 3 of warm-up: the 5th and the 10th are the last of their epochs
    assert first["lr"] == pytest.approx(3e-4 * (1 + math.cos(math.pi * 1 / 7)) / 2)
    assert last["lr"] == pytest.approx(3e-4 * (1 + math.cos(math.pi * 6 / 7)) / 2)
    record = json.loads((alone / "config.json").read_text())
    assert record["config"]["batch_size"] == 24
    assert record["deepspeed_config"]["train_batch_size"] == 24
    assert record["world_size"] == 1
    described = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert record["git_commit"].removesuffix("-dirty") == described.stdout.strip()
    with Image.open(alone / "curves.png") as picture:
        picture.verify()
    assert list((alone / "tensorboard").iterdir())
    checkpoints = sorted(p.name for p in (alone / "checkpoints").iterdir())
    assert checkpoints == ["step-0000000005-evaluated", "step-0000000010-evaluated"]


def test_the_final_weights_load_and_give_the_reported_accuracy(alone, images):
    classifier = load_classifier(alone / "model.safetensors")
    held_out = Folder(images / "val")
    batch = torch.stack([classifier.preprocess(held_out.image(i)) for i in range(40)])
    with torch.no_grad():
        predicted = classifier.model(batch).argmax(1).numpy()
    right = (predicted == held_out.labels).sum()
    assert 100 * right / 40 == pytest.approx(metrics(alone)[-1]["top1"])


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_every_zero_stage_trains_to_the_losses_of_one_process(stage, alone, train, tmp_path, short):
    train(*short, "--zero-stage", stage, "--out", tmp_path / "run")
    assert_same_training(tmp_path / "run", alone, rel=1e-4)
    whole = load_classifier(tmp_path / "run" / "checkpoints" / "step-0000000010-evaluated")
    final = load_file(tmp_path / "run" / "model.safetensors")
    assert whole.classes == [f"class{i}" for i in range(4)]
    assert all(torch.equal(t, final[name]) for name, t in whole.model.state_dict().items())


@pytest.fixture(scope="module")
def in_bf16(train, tmp_path_factory, short):
    """The run in bf16, on two processes without ZeRO."""
    out = tmp_path_factory.mktemp("bf16") / "run"
    train(*short, "--precision", "bf16", "--out", out)
    return out


@pytest.mark.slow
def test_bf16_trains_to_nearly_the_losses_of_fp32(in_bf16, alone):
    assert_same_training(in_bf16, alone, rel=0, absolute=0.05, weights=0.03)  # losses that begin at log 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_in_bf16_as_none_does(stage, in_bf16, train, tmp_path, short):
    train(*short, "--precision", "bf16", "--zero-stage", stage, "--out", tmp_path / "run")
    assert_same_training(tmp_path / "run", in_bf16, rel=0.03, weights=0.03)


def test_accumulation_activation_checkpointing_and_a_users_json_leave_the_training_as_it_is(
    alone, train, tmp_path, short
):
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 24, "gradient_accumulation_steps": 3}))
    flags = ["--deepspeed_config", tmp_path / "ds.json", "--activation-checkpointing", "--workers", "1"]
    without_batch = [*short[:6], *short[8:]]
    train(*without_batch, *flags, "--out", tmp_path / "run", ranks=1)
    assert_same_training(tmp_path / "run", alone, rel=1e-4)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["accumulation"] == 3


def test_all_that_imagenet_has_runs_on_two_processes_from_shards(run_command, train, tmp_path):
    """Mixing, augmentation, repeats, EMA, clipping, bf16, workers, fine-tuning from another head: 2 steps of each."""
    draw_coloured_images(tmp_path / "images", classes=4, train=12, val=5)
    done = run_command(BIN / "hatnet-shards", tmp_path / "images", "--out", tmp_path / "shards", "--resize", "48")
    assert done.returncode == 0, done.stderr
    start = tmp_path / "start.safetensors"
    save_checkpoint(create_model("hatnet_tiny", num_classes=9), start)
    small = ["--variant", "hatnet_tiny", "--image-size", "32", "--epochs", "2", "--batch-size", "24", "--workers", "1"]
    flags = [*small, "--ema-decay", "0.5", "--clip-grad", "1", "--zero-stage", "2", "--init", start]
    data = ["--recipe", "imagenet", "--data", tmp_path / "shards"]
    train(*data, *flags, "--out", tmp_path / "run")
    rows = metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(0 <= row["ema_top1"] <= 100 and 0 < row["train_loss"] < 5 for row in rows)
    assert load_file(tmp_path / "run" / "model.safetensors")["head.weight"].shape == (4, 384)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["init"] == str(start)
    assert {"hatnet-train", "timm", "torch", "python"} <= record["versions"].keys()
    for name in ("model", "model_ema"):
        checkpoint = tmp_path / "run" / f"{name}.safetensors"
        flags = [
            "--data",
            tmp_path / "shards",
            "--workers",
            "0",
            "--precision",
            "bf16",
            "--out",
            tmp_path / "row.json",
        ]
        train("--checkpoint", checkpoint, *flags, ranks=1, function="evaluate")
        row = json.loads((tmp_path / "row.json").read_text())
        assert row["images"] == 20
        assert row["top1"] == pytest.approx(rows[-1]["top1" if name == "model" else "ema_top1"])


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(alone, run_command, tmp_path, short):
    done = run_command(BIN / "hatnet-train", *short, "--compile", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "run", alone, rel=1e-3)


@pytest.mark.slow
def test_a_deterministic_run_ends_with_the_same_bits(alone, run_command, tmp_path, short):
    done = run_command(BIN / "hatnet-train", *short, "--deterministic", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "run", alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_deterministic_refuses_operations_without_a_deterministic_algorithm(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        use_deterministic_algorithms()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_held_out_images_are_counted_once_on_any_number_of_processes(alone, images, run_command, train, tmp_path):
    one, three = tmp_path / "one.json", tmp_path / "three.json"  # the launcher logs to standard output, too
    flags = ["--checkpoint", alone / "model.safetensors", "--data", images, "--workers", "0", "--batch", "6"]
    counts = [tmp_path / "one.csv", tmp_path / "three.csv"]
    train(*flags, "--out", one, "--per-class", counts[0], ranks=1, function="evaluate")
    flags += ["--out", three, "--per-class", counts[1]]
    done = run_command(*MODULE[:2], "3", "--no_python", BIN / "hatnet-eval", *flags)
    assert done.returncode == 0, done.stderr
    assert counts[0].read_text() == counts[1].read_text()
    with counts[0].open(newline="") as file:
        assert sum(int(row["images"]) for row in csv.DictReader(file)) == 40
    rows = [json.loads(result.read_text()) for result in (one, three)]
    assert [row["world_size"] for row in rows] == [1, 3]
    last = metrics(alone)[-1]
    for row in rows:
        assert row["images"] == 40
        assert (row["top1"], row["top5"]) == (pytest.approx(last["top1"]), pytest.approx(last["top5"]))
        assert row["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(("on_bad_image", "statuses"), [("strict", [1, 0]), ("replace", [0, 0])])
def test_images_that_cannot_be_read_are_not_counted_and_decide_on_the_status_after_all_others(
    on_bad_image, statuses, alone, images, launch, tmp_path
):
    """Each of two processes meets one; no held-out image is of class3."""
    shutil.copytree(images / "val", tmp_path / "images" / "val")
    shutil.rmtree(tmp_path / "images" / "val" / "class3")
    bad = [tmp_path / "images" / "val" / name for name in ("class0/0.jpg", "class2/9.jpg")]
    for path in bad:
        path.write_bytes(b"no image")
    flags = ["--checkpoint", alone, "--data", tmp_path / "images", "--workers", "0", "--out", tmp_path / "row.json"]
    with launch([*flags, "--on-bad-image", on_bad_image], function="evaluate") as started:
        assert started.wait() == statuses, started.text()
        assert all(started.text().count(str(path)) == 1 for path in bad)
        assert lines_naming(started.log(0), "warning", "class3")
    row = json.loads((tmp_path / "row.json").read_text())
    assert (row["images"], row["bad_images"]) == (28, 2)


def test_a_warm_up_that_takes_the_whole_run_is_a_warning(short, train, tmp_path):
    log = train(*short, "--warmup-epochs", "1.95", "--out", tmp_path / "run", ranks=1)
    assert lines_naming(log, "warning", "--warmup-epochs")
    assert lines_naming(log, "hatnet-train: ", " 120 ", " 4 ", " 40 ")


@pytest.mark.parametrize(
    ("flags", "status", "named"),
    [
        (["--rand-augment", "bogus"], 2, ["--rand-augment", "timm", "'bogus'"]),
        (["--init", "{folder}/no.pth"], 1, ["{folder}/no.pth"]),
        (["--deepspeed_config", "{folder}/typo.json"], 1, ["DeepSpeed", "AdamW", "typo"]),
        (["--precision", "fp16", "--zero-stage", "1"], 1, ["fp16", "--zero-stage", 1, "GPU"]),
    ],
)
def test_what_a_run_cannot_start_with_is_found_before_its_folder_is_made(flags, status, named, train, tmp_path, short):
    (tmp_path / "typo.json").write_text('{"optimizer": {"type": "AdamW", "params": {"typo": 1}}}')
    flags, named = ([str(part).format(folder=tmp_path) for part in parts] for parts in (flags, named))
    log = train(*short, *flags, "--out", tmp_path / "run", ranks=1, expected=status)
    error_line(log, "hatnet-train", *named)
    assert "Traceback" not in log
    assert not (tmp_path / "run").exists()


def test_a_preflight_finds_what_a_run_cannot_start_with(train, short):
    log = train(*short, "--preflight", "--rand-augment", "bogus", ranks=1, expected=2)
    error_line(log, "hatnet-train preflight", "--rand-augment", "timm", "'bogus'")
    assert "GB/s" not in log


def test_two_processes_of_a_launcher_train_as_one_does(alone, run_command, tmp_path, short):
    done = run_command(*MODULE, *short, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2
    assert_same_training(tmp_path / "run", alone, rel=1e-4)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("packages", "hatnet-train"), pytest.param(".", "packages/hatnet-train", marks=pytest.mark.slow)],
)
def test_the_folder_of_the_package_is_launched_like_the_module(folder, name, run_command, tmp_path, short):
    """A preflight, which reports every process and leaves no folder."""
    launch = [*MODULE[:-2], name, *short, "--preflight", "--out", tmp_path / "run"]
    done = run_command(*launch, cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert lines_naming(done.stdout, "processes ", " 2 ", " 1 ")
    assert lines_naming(done.stdout, "training data ", " 120 ")
    assert lines_naming(done.stdout, "GB/s")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def refused(launch):
    """Start a run that rank 0 refuses; check its error, before the others report theirs."""

    def refused(*arguments, ranks, named):
        with launch(arguments, ranks=ranks) as started:
            until(lambda: started.poll(0) is not None, 120, started.text)
            log = started.text()
            assert started.poll(0) == 1
            error_line(log, "hatnet-train preflight" if "--preflight" in arguments else "hatnet-train", *named)
            assert "Traceback" not in log

    return refused


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_folder_that_holds_a_run_is_refused_and_not_changed(ranks, alone, refused, short):
    before = {p: p.stat().st_mtime_ns for p in alone.rglob("*")}
    refused(*short, "--out", alone, ranks=ranks, named=[alone, "--out", "--resume"])
    assert {p: p.stat().st_mtime_ns for p in alone.rglob("*")} == before


def test_half_a_launcher_environment_is_refused_by_the_names_that_are_missing(
    run_command, tmp_path, monkeypatch, short
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = run_command(BIN / "hatnet-train", *short, "--out", tmp_path / "run")
    assert done.returncode == 1
    error_line(done.stderr, "hatnet-train", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert "Traceback" not in done.stderr


def test_a_run_folder_that_cannot_be_made_ends_the_launch_with_one_line(run_command, tmp_path, short):
    (tmp_path / "file").write_text("not a folder")
    done = run_command(*MODULE, *short, "--out", tmp_path / "file" / "run")
    assert done.returncode != 0
    error_line(done.stderr, "hatnet-train", "--out", tmp_path / "file" / "run")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("size", "named"), [("31", [2, 31]), ("1438", [1437, 1438])])
def test_a_batch_that_cannot_be_ends_the_launch_with_one_line(size, named, refused, tmp_path):
    run = ["--recipe", "digits", "--batch-size", size, "--out", tmp_path / "run"]
    refused(*run, ranks=2, named=["--batch-size", *named])
    assert not (tmp_path / "run").exists()
