"""Real runs: every way to launch hatnet-train, with real processes, must give the same training."""

import json
import math
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import BIN, ROOT
from hatnet_core import HATNet, create_model, load_checkpoint, read_metadata, save_checkpoint
from hatnet_train.classifier import load_classifier
from hatnet_train.data.folder import Folder

MODULE = [BIN / "deepspeed", "--num_accelerators", "2", "--module", "hatnet_train"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ImageNet-layout folder of 4 classes that differ in colour: 120 images to train with, 40 held out."""
    root = tmp_path_factory.mktemp("images")
    draw_images(root, classes=4, train=30, val=10)
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
    assert "epoch 2/2: train loss" in done.stderr
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


def draw_images(root, *, classes, train, val):
    """An ImageNet-layout folder of noise, each class of another colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for place in range(classes):
            folder = root / split / f"class{place}"
            folder.mkdir(parents=True)
            colour = np.array([place & 1, place >> 1 & 1, 0]) * 120
            for i in range(count):
                pixels = rng.integers(0, 120, (40 + i, 60, 3)) + colour
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")


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
    assert (alone / "checkpoints" / "latest").read_text() == "epoch-0002"
    assert sorted(p.name for p in (alone / "checkpoints").iterdir()) == ["epoch-0002", "latest"]


def test_the_final_weights_load_and_give_the_reported_accuracy(alone, images):
    classifier = load_classifier(alone / "model.safetensors")
    held_out = Folder(images / "val")
    batch = torch.stack([classifier.preprocess(held_out.image(i)) for i in range(40)])
    with torch.no_grad():
        predicted = classifier.model(batch).argmax(1).numpy()
    right = (predicted == held_out.labels).sum()
    assert 100 * right / 40 == pytest.approx(metrics(alone)[-1]["top1"])


def test_the_deepspeed_checkpoint_holds_the_final_weights(alone):
    (file,) = (alone / "checkpoints" / "epoch-0002").glob("*model_states.pt")
    model = HATNet(**read_metadata(alone / "model.safetensors")["config"])
    assert load_checkpoint(model, file) == []
    final = load_file(alone / "model.safetensors")
    assert all(torch.equal(t, final[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_to_the_losses_of_one_process(stage, alone, run_command, tmp_path, short):
    done = run_command(*MODULE, *short, "--zero-stage", stage, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "run", alone, rel=1e-4)
    whole = load_classifier(tmp_path / "run" / "checkpoints")  # of the parts of both processes
    final = load_file(tmp_path / "run" / "model.safetensors")
    assert whole.classes == [f"class{i}" for i in range(4)]
    assert all(torch.equal(t, final[name]) for name, t in whole.model.state_dict().items())


@pytest.fixture(scope="module")
def in_bf16(run_command, tmp_path_factory, short):
    """The run in bf16, on two processes without ZeRO."""
    out = tmp_path_factory.mktemp("bf16") / "run"
    done = run_command(*MODULE, *short, "--precision", "bf16", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_bf16_trains_to_nearly_the_losses_of_fp32(in_bf16, alone):
    assert_same_training(in_bf16, alone, rel=0, absolute=0.05, weights=0.03)  # losses that begin at log 4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_in_bf16_as_none_does(stage, in_bf16, run_command, tmp_path, short):
    done = run_command(*MODULE, *short, "--precision", "bf16", "--zero-stage", stage, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "run", in_bf16, rel=0.03, weights=0.03)


def test_accumulation_activation_checkpointing_and_a_users_json_leave_the_training_as_it_is(
    alone, run_command, tmp_path, short
):
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 24, "gradient_accumulation_steps": 3}))
    flags = ["--deepspeed_config", tmp_path / "ds.json", "--activation-checkpointing", "--workers", "1"]
    without_batch = [*short[:6], *short[8:]]
    done = run_command(BIN / "hatnet-train", *without_batch, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "run", alone, rel=1e-4)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["accumulation"] == 3


def test_all_that_imagenet_has_runs_on_two_processes_from_shards(run_command, tmp_path):
    """Mixing, augmentation, repeats, EMA, clipping, bf16, workers, fine-tuning from another head: 2 steps of each."""
    draw_images(tmp_path / "images", classes=4, train=12, val=5)
    done = run_command(BIN / "hatnet-shards", tmp_path / "images", tmp_path / "shards", "--resize", "48")
    assert done.returncode == 0, done.stderr
    start = tmp_path / "start.safetensors"
    save_checkpoint(create_model("hatnet_tiny", num_classes=9), start)
    small = ["--variant", "hatnet_tiny", "--image-size", "32", "--epochs", "2", "--batch-size", "24", "--workers", "1"]
    flags = [*small, "--ema-decay", "0.5", "--clip-grad", "1", "--zero-stage", "2", "--init", start]
    data = ["--recipe", "imagenet", "--data", tmp_path / "shards"]
    done = run_command(*MODULE, *data, *flags, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(0 <= row["ema_top1"] <= 100 and 0 < row["train_loss"] < 5 for row in rows)
    assert load_file(tmp_path / "run" / "model.safetensors")["head.weight"].shape == (4, 384)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["init"] == str(start)
    assert {"hatnet-train", "timm", "torch", "python"} <= record["versions"].keys()
    for name in ("model", "model_ema"):
        checkpoint = tmp_path / "run" / f"{name}.safetensors"
        flags = ["--data", tmp_path / "shards", "--workers", "0", "--precision", "bf16", "--format", "json"]
        done = run_command(BIN / "hatnet-eval", "--checkpoint", checkpoint, *flags)
        assert done.returncode == 0, done.stderr
        row = json.loads(done.stdout)
        assert row["images"] == 20
        assert row["top1"] == pytest.approx(rows[-1]["top1" if name == "model" else "ema_top1"])


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one(alone, run_command, tmp_path, short):
    done = run_command(BIN / "hatnet-train", *short, "--compile", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_training(tmp_path / "run", alone, rel=1e-3)


def test_held_out_images_are_counted_once_on_any_number_of_processes(alone, images, run_command, tmp_path):
    result = tmp_path / "row.json"  # the launcher logs to standard output, too
    flags = ["--checkpoint", alone / "model.safetensors", "--data", images, "--workers", "0", "--out", result]
    three = [*MODULE[:2], "3", "--no_python", BIN / "hatnet-eval"]
    rows = []
    for launch in ([BIN / "hatnet-eval"], three):
        done = run_command(*launch, *flags, "--batch-size", "6")
        assert done.returncode == 0, done.stderr
        rows.append(json.loads(result.read_text()))
    assert [row["world_size"] for row in rows] == [1, 3]
    last = metrics(alone)[-1]
    for row in rows:
        assert row["images"] == 40
        assert (row["top1"], row["top5"]) == (pytest.approx(last["top1"]), pytest.approx(last["top5"]))
        assert row["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--rand-augment", "bogus"], "rand_augment must be a policy of timm such as rand-m9-mstd0.5, got 'bogus'"),
        (["--init", "nofile.pth"], "no checkpoint at nofile.pth: expected an existing file"),
        (
            ["--deepspeed_config", "typo.json"],
            "DeepSpeed refuses its configuration: AdamW.__init__() got an unexpected",
        ),
        (["--precision", "fp16", "--zero-stage", "1"], "precision fp16 with zero_stage 1 needs a GPU; on a CPU"),
    ],
)
def test_what_a_run_cannot_start_with_is_found_before_its_folder_is_made(
    flags, expected, run_command, tmp_path, short
):
    (tmp_path / "typo.json").write_text('{"optimizer": {"type": "AdamW", "params": {"typo": 1}}}')
    done = run_command(BIN / "hatnet-train", *short, *flags, "--out", tmp_path / "run", cwd=tmp_path)
    assert done.returncode == 1
    assert f"hatnet-train: error: {expected}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_preflight_finds_what_a_run_cannot_start_with(run_command, short):
    done = run_command(BIN / "hatnet-train", *short, "--preflight", "--rand-augment", "bogus")
    assert done.returncode == 1
    assert "hatnet-train: error: rand_augment must be a policy of timm such as rand-m9-mstd0.5" in done.stderr
    assert done.stdout == ""


def test_a_preflight_reports_every_process_and_leaves_no_folder(run_command, tmp_path, short):
    done = run_command(*MODULE, *short, "--preflight", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "processes      2 on 1 host(s)" in done.stdout
    assert "training data  120 images, " in done.stdout
    assert "bus bandwidth " in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("launch", "folder"),
    [
        (MODULE, "."),
        ([BIN / "deepspeed", "--num_accelerators", "2", "hatnet-train"], "packages"),
        ([BIN / "deepspeed", "--num_accelerators", "2", "packages/hatnet-train"], "."),
    ],
    ids=["module", "folder from packages", "folder from the root"],
)
def test_two_processes_however_launched_train_as_one_does(launch, folder, alone, run_command, tmp_path, short):
    done = run_command(*launch, *short, "--out", tmp_path / "run", cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2
    assert_same_training(tmp_path / "run", alone, rel=1e-4)


@pytest.mark.parametrize("launch", [[BIN / "hatnet-train"], MODULE], ids=["alone", "two processes"])
def test_a_run_folder_that_holds_a_run_is_refused_and_left_as_it_is(launch, alone, run_command, short):
    before = {p: p.stat().st_mtime_ns for p in alone.rglob("*")}
    done = run_command(*launch, *short, "--out", alone)
    assert done.returncode != 0
    assert f"hatnet-train: error: run folder {alone} is not empty" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in alone.rglob("*")} == before


def test_half_a_launcher_environment_is_refused_by_the_names_that_are_missing(
    run_command, tmp_path, monkeypatch, short
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = run_command(BIN / "hatnet-train", *short, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "the environment lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT; a launcher sets RANK, " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_that_cannot_be_made_ends_the_launch_with_one_line(run_command, tmp_path, short):
    (tmp_path / "file").write_text("not a folder")
    done = run_command(*MODULE, *short, "--out", tmp_path / "file" / "run")
    assert done.returncode != 0
    assert done.stderr.count("hatnet-train: error: ") == 1
    assert f"cannot make run folder {tmp_path / 'file' / 'run'}: Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "31"], "batch_size must be a multiple of 2 (a share for each of 2 processes × "),
        (["--batch-size", "1438"], "batch_size must be at most the 1437 training images, got 1438"),
    ],
)
def test_a_batch_that_cannot_be_ends_the_launch_with_one_line(arguments, expected, run_command, tmp_path):
    done = run_command(*MODULE, "--recipe", "digits", *arguments, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("hatnet-train: error: ") == 1
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()
