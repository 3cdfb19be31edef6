"""Two processes: data-parallel training through torchrun, and DeepSpeed's ZeRO, on a CPU through gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hatnet_dense.cli import main

SHAPES = Path(__file__).parent / "shapes"
CONFIG = str(SHAPES / "retinanet.py")
OPTIONS = ["--cfg-options", "train_cfg.val_interval=1", "default_hooks.logger.interval=1"]
OPTIONS += ["train_dataloader.dataset.pipeline.3.prob=0"]  # MMEngine does not resume the dice of the flips

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    subprocess.run([sys.executable, SHAPES / "draw.py", out, "--train", "16", "--val", "4"], check=True)
    os.environ["SHAPES"] = str(out)
    yield out
    del os.environ["SHAPES"]


def train(work_dir, *arguments, epochs, status=0):
    """Train in two processes of torchrun; what they wrote to stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hatnet_dense", "train"]
    command += [CONFIG, "--launcher", "pytorch", "--work-dir", str(work_dir), *arguments]
    run = subprocess.run(
        [*command, *OPTIONS, f"train_cfg.max_epochs={epochs}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == status, run.stderr
    return run.stderr


def losses(work_dir):
    """Of every step, over all logs of the run in order."""
    logs = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    rows = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data_parallel")
    train(folder, epochs=2)
    return folder


def test_two_processes_share_the_data_and_write_one_checkpoint(data_parallel):
    assert len(losses(data_parallel)) == 4  # 16 images, 2 processes with 4
    content = torch.load((data_parallel / "last_checkpoint").read_text(), weights_only=True)
    assert content["meta"]["iter"] == 4
    assert all(name.startswith(("backbone.", "neck.", "bbox_head.")) for name in content["state_dict"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_trains_as_data_parallel_training_does_and_resumes(stage, data_parallel, tmp_path, capsys):
    arguments = ["--zero-stage", str(stage)]
    train(tmp_path, *arguments, epochs=1)
    train(tmp_path, *arguments, "--resume", epochs=2)
    assert losses(tmp_path) == pytest.approx(losses(data_parallel), rel=1e-4)
    plain = torch.load((data_parallel / "last_checkpoint").read_text(), weights_only=True)["state_dict"]
    whole = torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"]
    assert whole.keys() == plain.keys()
    for name, value in whole.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-5)
    assert main(["test", CONFIG, str(tmp_path / "model.pth"), "--work-dir", str(tmp_path / "test"), *OPTIONS]) == 0
    assert main(["test", CONFIG, str(tmp_path / "epoch_2.pth"), "--work-dir", str(tmp_path / "test"), *OPTIONS]) == 1
    assert "is a folder of DeepSpeed: expected a file, such as model.pth of its run" in capsys.readouterr().err


class Foreign:
    """What a file from elsewhere could make a careless loader call."""

    def __reduce__(self):
        return print, ("code of the file ran",)


def test_a_checkpoint_folder_that_holds_code_is_not_loaded(tmp_path):
    train(tmp_path, "--zero-stage", "1", epochs=1)
    states = tmp_path / "epoch_1.pth" / "mp_rank_00_model_states.pt"
    content = torch.load(states, weights_only=True)
    torch.save({**content, "extra": Foreign()}, states)
    output = train(tmp_path, "--zero-stage", "1", "--resume", epochs=2, status=1)
    assert "holds more than tensors and plain records, and is not loaded" in output


def test_data_that_one_process_finds_wanting_ends_both(shapes, tmp_path):
    (shapes / "train2017" / "000002.jpg").rename(tmp_path / "away.jpg")
    try:
        output = train(tmp_path / "run", epochs=1, status=1)
    finally:
        (tmp_path / "away.jpg").rename(shapes / "train2017" / "000002.jpg")
    assert output.count("train2017/000002.jpg is missing") == 2
