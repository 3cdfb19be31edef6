"""Weights after training with each of DeepSpeed's stages, in real processes."""

import os
from pathlib import Path

import pytest
import torch
from deepspeed import comm as dist
from safetensors.torch import load_file, save_file

from hatnet_core import create_model
from hatnet_train import build_config
from hatnet_train.deepspeed.config import deepspeed_config
from hatnet_train.deepspeed.ema import Ema
from hatnet_train.deepspeed.engine import build_engine
from hatnet_train.deepspeed.partition import full_weights, whole_model
from hatnet_train.distributed.environment import discover
from hatnet_train.distributed.launch import join
from hatnet_train.optim import Schedule, set_lr

pytestmark = pytest.mark.long


def three_steps(arguments):
    """Train three steps in a process of a launch; rank 0 writes the weights after each."""
    out, stage, precision = Path(arguments[0]), int(arguments[1]), arguments[2]
    join(discover(os.environ), 60)
    config = build_config("digits", {"zero_stage": stage, "precision": precision, "batch_size": 4, "lr": 1e-3})
    user = {"bf16": {"enabled": True}} if precision == "bf16" and stage == 2 else {}
    engine = build_engine(config, deepspeed_config(config, world_size=2, user=user), 3)
    dtype = next(engine.module.parameters()).dtype
    ema, history = Ema(engine, 0.5), []
    schedule = Schedule.of(config, steps_per_epoch=10)
    for step in range(3):
        set_lr(engine, schedule(step))
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        images = torch.randn(2, 3, 32, 32, generator=generator).to(dtype)
        loss = engine(images).float().logsumexp(1).mean()
        engine.backward(loss)
        engine.step()
        ema.update()
        history.append(full_weights(engine))
    averaged, images = ema.weights(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    engine.eval()
    with torch.no_grad():
        inside = engine(images.to(dtype)).float()
        outside = whole_model(engine, history[-1])(images)
    if dist.get_rank() == 0:
        save_file({f"{i}/{n}": t for i, w in enumerate(history) for n, t in w.items()}, out / "history.safetensors")
        save_file(averaged, out / "averaged.safetensors")
        save_file({"inside": inside, "outside": outside}, out / "logits.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(launch, tmp_path_factory):
    """Run three steps at a stage; weights after each, their average, and logits inside and outside the engine."""
    folder = tmp_path_factory.mktemp("weights")

    def run(stage, precision):
        out = folder / f"{stage}{precision}"
        if not out.exists():
            out.mkdir()
            with launch([out, stage, precision], module="test_weights", function="three_steps") as started:
                assert started.wait() == [0, 0], started.text()
        return [load_file(out / f"{name}.safetensors") for name in ("history", "averaged", "logits")]

    return run


def assert_trained_alike(tensor, expected):
    """Alike up to the order of sums: AdamW moves every weight by about lr, 1e-3, in the direction of its gradient.

    Where that is about 0, the order in which processes are summed decides on the direction: single weights may be a
    tenth of a step apart, not their mean.
    """
    torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)
    assert (tensor - expected).abs().mean() < 1e-6


@pytest.mark.parametrize(("stage", "precision"), [pytest.param(1, "fp32", marks=pytest.mark.slow), (3, "fp32")])
def test_weights_are_put_together_from_all_parts_and_equal_those_of_stage_0(stage, precision, trained):
    history, averaged, logits = trained(stage, precision)
    expected, expected_average, _ = trained(0, precision)
    assert history.keys() == expected.keys()
    for name, tensor in history.items():
        assert_trained_alike(tensor, expected[name])
    for name, tensor in averaged.items():
        assert_trained_alike(tensor, expected_average[name])
    torch.testing.assert_close(logits["inside"], logits["outside"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [pytest.param(0, "fp32", marks=pytest.mark.slow), (3, "fp32"), pytest.param(2, "bf16", marks=pytest.mark.slow)],
)
def test_the_average_follows_the_weights_by_its_decay(stage, precision, trained):
    history, averaged, _ = trained(stage, precision)
    tolerance = {"rtol": 2**-8, "atol": 1e-5} if precision == "bf16" else {}  # the bf16 section keeps weights in bf16
    torch.manual_seed(0)
    start = create_model("hatnet_tiny", num_classes=3, drop_rate=0.0).state_dict()
    for name, tensor in averaged.items():
        expected = start[name]
        for step in range(3):
            expected = 0.5 * expected + 0.5 * history[f"{step}/{name}"]
        torch.testing.assert_close(tensor, expected, **tolerance)


def test_weights_move_at_every_step_and_are_fp32_at_any_precision(trained):
    history, averaged, _ = trained(2, "bf16")
    assert {tensor.dtype for tensor in (*history.values(), *averaged.values())} == {torch.float32}
    for step in (1, 2):
        assert not torch.equal(history[f"{step}/head.weight"], history[f"{step - 1}/head.weight"])
    assert averaged.keys() == {name[2:] for name in history if name.startswith("0/")}
