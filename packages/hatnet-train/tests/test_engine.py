"""Real runs: every way to launch hatnet-train, with real processes, must give the same training."""

import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import BIN, ROOT
from hatnet_core import HATNet, load_checkpoint, read_metadata
from hatnet_train.data import Digits

SHORT = ["--recipe", "digits", "--epochs", "2", "--batch-size", "240", "--lr", "3e-4", "--seed", "5"]
MODULE = [BIN / "deepspeed", "--num_accelerators", "2", "--module", "hatnet_train"]


@pytest.fixture(scope="module")
def alone(run_command, tmp_path_factory):
    """The run folder of one process without a launcher."""
    out = tmp_path_factory.mktemp("alone") / "run"
    done = run_command(BIN / "hatnet-train", *SHORT, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2: train loss" in done.stderr
    return out


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_and_leaves_everything_it_promises(alone):
    first, last = metrics(alone)
    assert last["eval_loss"] < first["eval_loss"] < 2.31
    assert last["top1"] > 30
    # 10 steps, 3 of warm-up: the 5th and the 10th are the last of their epochs
    assert first["lr"] == pytest.approx(3e-4 * (1 + math.cos(math.pi * 1 / 7)) / 2)
    assert last["lr"] == pytest.approx(3e-4 * (1 + math.cos(math.pi * 6 / 7)) / 2)
    record = json.loads((alone / "config.json").read_text())
    assert record["config"]["batch_size"] == 240
    assert record["world_size"] == 1
    with Image.open(alone / "curves.png") as picture:
        picture.verify()
    assert list((alone / "tensorboard").iterdir())
    assert (alone / "checkpoints" / "latest").read_text() == "epoch-0002"
    assert sorted(p.name for p in (alone / "checkpoints").iterdir()) == ["epoch-0002", "latest"]


def test_the_final_weights_load_and_give_the_reported_accuracy(alone):
    model = HATNet(**read_metadata(alone / "model.safetensors")["config"]).eval()
    load_checkpoint(model, alone / "model.safetensors")
    held_out = Digits(train=False, size=32)
    with torch.no_grad():
        predicted = torch.cat([model(held_out[i][None]).argmax(1) for i in range(360)])
    right = (predicted == held_out.labels).sum().item()
    assert 100 * right / 360 == pytest.approx(metrics(alone)[-1]["top1"])


def test_the_deepspeed_checkpoint_holds_the_final_weights(alone):
    (file,) = (alone / "checkpoints" / "epoch-0002").glob("*model_states.pt")
    state = torch.load(file, map_location="cpu", weights_only=False)["module"]  # written by the run above
    final = load_file(alone / "model.safetensors")
    assert state.keys() == final.keys()
    assert all(torch.equal(state[name], final[name]) for name in final)


@pytest.mark.parametrize(
    ("launch", "folder"),
    [
        (MODULE, "."),
        ([BIN / "deepspeed", "--num_accelerators", "2", "hatnet-train"], "packages"),
        ([BIN / "deepspeed", "--num_accelerators", "2", "packages/hatnet-train"], "."),
    ],
    ids=["module", "folder from packages", "folder from the root"],
)
def test_two_processes_however_launched_train_as_one_does(launch, folder, alone, run_command, tmp_path):
    done = run_command(*launch, *SHORT, "--out", tmp_path / "run", cwd=ROOT / folder)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world_size"] == 2
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(alone), strict=True):
        for name in ("train_loss", "eval_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert ours["lr"] == theirs["lr"]
    one, two = load_file(alone / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    difference = sum((one[n] - two[n]).double().square().sum() for n in one).sqrt()
    assert difference < 1e-3 * sum(t.double().square().sum() for t in one.values()).sqrt()


@pytest.mark.parametrize("launch", [[BIN / "hatnet-train"], MODULE], ids=["alone", "two processes"])
def test_a_run_folder_that_holds_a_run_is_refused_and_left_as_it_is(launch, alone, run_command):
    before = {p: p.stat().st_mtime_ns for p in alone.rglob("*")}
    done = run_command(*launch, *SHORT, "--out", alone)
    assert done.returncode != 0
    assert f"hatnet-train: error: run folder {alone} is not empty" in done.stderr
    assert "Traceback" not in done.stderr
    assert {p: p.stat().st_mtime_ns for p in alone.rglob("*")} == before


def test_half_a_launcher_environment_is_refused_by_the_names_that_are_missing(run_command, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = run_command(BIN / "hatnet-train", *SHORT, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "the environment lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT; a launcher sets RANK, " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_folder_that_cannot_be_made_ends_the_launch_with_one_line(run_command, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = run_command(*MODULE, *SHORT, "--out", tmp_path / "file" / "run")
    assert done.returncode != 0
    assert done.stderr.count("hatnet-train: error: ") == 1
    assert f"cannot make run folder {tmp_path / 'file' / 'run'}: Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "31"], "batch_size must be a multiple of the number of processes, got 31 on 2"),
        (["--batch-size", "1438"], "batch_size must be at most the 1437 training images, got 1438"),
    ],
)
def test_a_batch_that_cannot_be_ends_the_launch_with_one_line(arguments, expected, run_command, tmp_path):
    done = run_command(*MODULE, "--recipe", "digits", *arguments, "--out", tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("hatnet-train: error: ") == 1
    assert expected in done.stderr
    assert not (tmp_path / "run").exists()
