"""Real runs with the options of fine-tuning: frozen weights, layer-wise rates, early stopping, more epochs, limits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hatnet_core import create_model, read_metadata, save_checkpoint
from hatnet_train.config import TrainConfig
from hatnet_train.optim import Schedule
from hatnet_train.run.checkpoint import committed
from hatnet_train.run.folder import check_run, values_of_run
from hatnet_train.run.state import BEST
from image_folders import draw_coloured_images
from launches import lines_naming


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of three classes, without train/ and val/: 10 images each."""
    root = tmp_path_factory.mktemp("photos")
    draw_coloured_images(root, classes=3, train=10, val=1)
    return root / "train"


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights of another number of classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    save_checkpoint(create_model("hatnet_tiny", num_classes=7), path)
    return path


@pytest.fixture(scope="module")
def short(photos, start):
    """Arguments of a run of 2 epochs of 3 steps at 32 pixels."""
    small = ["--image-size", "32", "--batch-size", "8", "--epochs", "2", "--workers", "0"]
    return ["--recipe", "finetune", "--data", photos, "--init", start, *small]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(train, short, tmp_path_factory):
    """The folder of a whole run of one process, and its log."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, train(*short, "--out", out, ranks=1)


def test_one_command_trains_from_a_folder_of_classes_and_keeps_its_best_weights(alone):
    out, log = alone
    assert lines_naming(log, "hatnet-train: ", "24 training images of 3 classes", "6 held out")
    assert lines_naming(log, "hatnet-train: precision ")
    config = json.loads((out / "config.json").read_text())["config"]
    assert config["precision"] in ("bf16", "fp32")
    assert config["variant"] == "hatnet_tiny"
    best = max(row[name] for row in metrics(out) for name in ("top1", "ema_top1"))
    assert read_metadata(out / BEST)["top1"] == best
    kept = load_file(out / BEST)
    candidates = [load_file(f) for c in committed(out / "checkpoints") for f in c.glob("model*.safetensors")]
    assert any(all(torch.equal(kept[name], other[name]) for name in kept) for other in candidates)
    assert check_run(out)[out] == []
    assert BEST in json.loads((out / "manifest.json").read_text())["files"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_frozen_backbone_keeps_its_bits_at_every_zero_stage_and_the_head_learns(
    stage, train, short, start, tmp_path
):
    out = tmp_path / "run"
    flags = ["--freeze", "backbone", "--zero-stage", stage, "--precision", "fp32"]
    train(*short, *flags, "--max-steps", "4", "--out", out)
    train(*short, *flags, "--out", out, "--resume", "auto")
    assert [row["epoch"] for row in metrics(out)] == [1, 2, 3]  # steps 3, 4 and 6
    before = load_file(start)
    for name in ("model.safetensors", "model_ema.safetensors"):
        after = load_file(out / name)
        assert [key for key in after if not key.startswith("head.") and not torch.equal(after[key], before[key])] == []
    moments = load_file(committed(out / "checkpoints")[0] / "optimizer.safetensors")
    assert {key.partition("/")[2] for key in moments} == {"head.weight", "head.bias"}
    assert moments["exp_avg/head.weight"].any()


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_layer_wise_rates_train_on_two_processes_under_zero_as_on_one(stage, train, short, tmp_path):
    still = ["--drop-rate", "0", "--drop-path-rate", "0", "--precision", "fp32", "--epochs", "1"]
    train(*short, *still, "--out", tmp_path / "one", ranks=1)
    train(*short, *still, "--zero-stage", stage, "--out", tmp_path / "two")
    (one,), (two,) = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-4)
    assert two["lr"] == one["lr"]


def test_a_run_stops_early_on_all_ranks_and_continues_on_request(train, short, tmp_path):
    """With a learning rate of nothing, no epoch is better than the first."""
    out = tmp_path / "run"
    still = ["--lr", "1e-30", "--min-lr", "0", "--ema-decay", "0", "--epochs", "5", "--early-stopping", "2"]
    log = train(*short, *still, "--out", out)
    assert lines_naming(log, "hatnet-train: ", "--early-stopping 2")
    assert len(metrics(out)) == 3
    train("--config", out, "--early-stopping", "0", "--out", out, "--resume", "auto", ranks=1)
    assert len(metrics(out)) == 5


def test_a_finished_run_is_extended_with_the_cosine_of_all_its_epochs(alone, train, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(alone[0], out)
    line = ["--config", out / "config.json", "--epochs", "3", "--out", out, "--resume", "auto"]
    log = train(*line, ranks=1)
    assert lines_naming(log, "hatnet-train: ", "6", "9", "learning rate")
    rows, before = metrics(out), metrics(alone[0])
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[:2] == before
    config = TrainConfig.from_dict(values_of_run(out))
    assert (config.optimisation.epochs, config.optimisation.warmup_epochs) == (3, 0.2)
    assert rows[2]["lr"] == Schedule.of(config, steps_per_epoch=3)(8)
    assert check_run(out)[out] == []
