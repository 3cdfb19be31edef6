"""Real runs: every way to launch hatnet-train, with real processes, must give the same training."""

import json
import math
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import BIN, ROOT
from hatnet_core import HATNet, create_model, load_checkpoint, read_metadata
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
    model = HATNet(**read_metadata(alone / "model.safetensors")["config"])
    assert load_checkpoint(model, file) == []
    final = load_file(alone / "model.safetensors")
    assert all(torch.equal(t, final[name]) for name, t in model.state_dict().items())


EXPORT = """
import sys
import deepspeed, torch
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as export
from hatnet_core import create_model, save_checkpoint

torch.manual_seed(0)
out, model = sys.argv[1], create_model("hatnet_tiny", num_classes=3)
config = {"train_batch_size": 2, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
engine.save_checkpoint(f"{out}/checkpoints", tag="last")
if engine.global_rank == 0:
    export(f"{out}/checkpoints", f"{out}/pickled")
    export(f"{out}/checkpoints", f"{out}/safe", safe_serialization=True)
"""


def test_weights_that_deepspeed_exports_from_a_sharded_checkpoint_load(run_command, tmp_path):
    (tmp_path / "export.py").write_text(EXPORT)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = run_command(*torchrun, tmp_path / "export.py", tmp_path)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    expected = create_model("hatnet_tiny", num_classes=3).state_dict()
    for file in (tmp_path / "pickled" / "pytorch_model.bin", tmp_path / "safe" / "model.safetensors"):
        model = create_model("hatnet_tiny", num_classes=3)
        assert load_checkpoint(model, file) == []
        for name, p in model.state_dict().items():
            torch.testing.assert_close(p, expected[name], rtol=2**-8, atol=0)  # DeepSpeed was given bf16


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
