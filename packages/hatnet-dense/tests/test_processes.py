"""Two processes: data-parallel training through torchrun, and DeepSpeed's ZeRO, on a CPU through gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hatnet_dense.cli import main
from hatnet_testing import check

SHAPES = Path(__file__).parent / "shapes"
CONFIG = str(SHAPES / "retinanet.py")
OPTIONS = ["--cfg-options", "train_cfg.val_interval=1", "default_hooks.logger.interval=1"]
OPTIONS += ["train_dataloader.dataset.pipeline.3.prob=0.0"]  # MMEngine does not resume the random state of the flips

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp("shapes")
    subprocess.run([sys.executable, SHAPES / "draw.py", out, "--train", "16", "--val", "4"], check=True)
    os.environ["SHAPES"] = str(out)
    yield out
    del os.environ["SHAPES"]


def launch(command, config, work_dir, *arguments, status=0):
    """Run a command in two processes of torchrun, and return their stderr."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hatnet_dense", command]
    run = subprocess.run(
        [*words, config, "--launcher", "pytorch", "--work-dir", str(work_dir), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == status, run.stderr
    return run.stderr


def train(work_dir, *arguments, epochs, status=0):
    """Train the detector in two processes."""
    more = [*OPTIONS, f"train_cfg.max_epochs={epochs}"]
    return launch("train", CONFIG, work_dir, *arguments, *more, status=status)


def losses(work_dir):
    """Read the losses of all steps from the logs of a run."""
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
    assert losses(tmp_path) == pytest.approx(losses(data_parallel), rel=5e-4)  # sums in another order
    plain = torch.load((data_parallel / "last_checkpoint").read_text(), weights_only=True)["state_dict"]
    whole = torch.load(tmp_path / "model.pth", weights_only=True)["state_dict"]
    assert whole.keys() == plain.keys()
    for name, value in whole.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=2e-4)
    assert main(["test", CONFIG, str(tmp_path / "model.pth"), "--work-dir", str(tmp_path / "test"), *OPTIONS]) == 0
    assert main(["test", CONFIG, str(tmp_path / "epoch_2.pth"), "--work-dir", str(tmp_path / "test"), *OPTIONS]) == 1
    check(capsys.readouterr().err, tmp_path / "epoch_2.pth", "model.pth")


def test_two_processes_test_what_one_does(data_parallel, tmp_path):
    checkpoint = (data_parallel / "last_checkpoint").read_text()
    metrics = []
    for name in ("one", "two"):
        arguments = [checkpoint, "--out", str(tmp_path / f"{name}.json"), *OPTIONS]
        if name == "two":
            launch("test", CONFIG, tmp_path / name, *arguments)
        else:
            assert (
                main(["test", CONFIG, *arguments[: -len(OPTIONS)], "--work-dir", str(tmp_path / name), *OPTIONS]) == 0
            )
        metrics.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert metrics[0] == metrics[1]


def test_a_segmenter_whose_norms_are_synchronised_on_gpus_trains_without_one(tmp_path):
    options = ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    small = [*options, "train_dataloader.batch_size=2", "default_hooks.logger.interval=1"]
    launch("train", str(SHAPES / "semfpn.py"), tmp_path, "--cfg-options", *small)
    assert len(losses(tmp_path)) == 2
    weights = torch.load(tmp_path / "iter_2.pth", weights_only=True)["state_dict"]
    assert any(name.endswith("running_mean") for name in weights)


def test_zero_scales_the_learning_rate_as_data_parallel_training_does(tmp_path):
    rates = []
    for name, arguments in (("plain", []), ("zero", ["--zero-stage", "1"])):
        train(tmp_path / name, "--auto-scale-lr", *arguments, epochs=1)
        (log,) = (tmp_path / name).glob("*/vis_data/scalars.json")
        rates.append([row["lr"] for row in map(json.loads, log.read_text().splitlines()) if "lr" in row])
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)
    assert rates[0][0] == pytest.approx(4e-4 * 0.01 * 8 / 16, rel=1e-6)  # first step of the warm-up, 8 images of 16


class Foreign:
    """Object whose unpickling runs code."""

    def __reduce__(self):
        return print, ("code of the file ran",)


def test_a_checkpoint_folder_that_holds_code_is_not_loaded(tmp_path):
    train(tmp_path, "--zero-stage", "1", epochs=1)
    states = tmp_path / "epoch_1.pth" / "mp_rank_00_model_states.pt"
    content = torch.load(states, weights_only=True)
    torch.save({**content, "extra": Foreign()}, states)
    output = train(tmp_path, "--zero-stage", "1", "--resume", epochs=2, status=1)
    assert f"error: {tmp_path / 'epoch_1.pth'}: " in output


def test_data_that_one_process_finds_wanting_ends_both(shapes, tmp_path):
    (shapes / "train2017" / "000002.jpg").rename(tmp_path / "away.jpg")
    try:
        output = train(tmp_path / "run", epochs=1, status=1)
    finally:
        (tmp_path / "away.jpg").rename(shapes / "train2017" / "000002.jpg")
    assert output.count("train2017/000002.jpg: ") == 2
