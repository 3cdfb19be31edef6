import pytest
import torch

from hatnet_core import create_model
from hatnet_testing import raises
from hatnet_train import build_config
from hatnet_train.deepspeed_config import deepspeed_config, lr_factor, parameter_groups


def test_the_global_batch_is_shared_by_the_processes():
    settings = deepspeed_config(build_config("digits", {}), world_size=2)
    assert settings["train_batch_size"] == 32
    assert settings["train_micro_batch_size_per_gpu"] == 16


def test_the_rate_rises_in_equal_steps_to_its_peak_and_falls_along_a_cosine_to_nearly_zero():
    factors = [lr_factor(step, warmup_steps=4, total_steps=104) for step in range(104)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors == sorted(factors[:4]) + sorted(factors[4:], reverse=True)
    assert factors[54] == pytest.approx(0.5)
    assert 0 < factors[-1] < 1e-3
    weights = [torch.nn.Parameter(torch.zeros(1))]
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(weights, lr=1.0), T_max=100)
    for factor in factors[4:]:
        assert factor == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        reference.optimizer.step()
        reference.step()


def test_a_run_without_warmup_starts_at_the_peak_and_one_of_a_single_step_has_it():
    assert lr_factor(0, warmup_steps=0, total_steps=10) == 1.0
    assert lr_factor(0, warmup_steps=1, total_steps=1) == 1.0
    assert lr_factor(5, warmup_steps=5, total_steps=5) == 1.0  # which the scheduler asks for after the last step


def test_the_cosine_leads_to_the_floor():
    factors = [lr_factor(step, warmup_steps=0, total_steps=1000, floor=0.1) for step in range(1000)]
    assert factors[0] == 1.0
    assert factors[500] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "world_size", "named"),
    [
        ({}, 3, [3, 32]),
        ({"accumulation": 5}, 1, [5, 32]),
        ({"mixup": 0.8, "batch_size": 6}, 2, [4, 2, 6]),
    ],
)
def test_a_batch_that_the_processes_cannot_share_is_refused(values, world_size, named):
    with raises(ValueError, "batch_size", "accumulation", *named):
        deepspeed_config(build_config("digits", values), world_size=world_size)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "section"),
    [
        ("bf16", 2, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
        ("fp16", 0, {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
        ("fp16", 1, {"fp16": {"enabled": True}}),
        ("fp32", 3, {}),
    ],
)
def test_precision_stage_accumulation_and_clipping_are_deepspeeds(precision, zero_stage, section):
    values = {"precision": precision, "zero_stage": zero_stage, "accumulation": 2, "clip_grad": 1.5}
    settings = deepspeed_config(build_config("digits", values), world_size=2)
    precisions = {name: value for name, value in settings.items() if name in ("torch_autocast", "fp16", "bf16")}
    assert precisions == section
    assert settings["zero_optimization"]["stage"] == zero_stage
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 1.5
    assert settings["train_micro_batch_size_per_gpu"] == 8


def test_biases_and_norms_alone_are_free_of_weight_decay():
    with torch.device("meta"):
        model = create_model("hatnet_tiny")
    decayed, free = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert all(names[id(p)].endswith(".weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith(".bias") or "norm" in names[id(p)] for p in free["params"])
