import pytest

from hatnet_testing import raises
from hatnet_train import build_config
from hatnet_train.deepspeed.config import deepspeed_config


def test_the_global_batch_is_shared_by_the_processes():
    settings = deepspeed_config(build_config("digits", {}), world_size=2)
    assert settings["train_batch_size"] == 32
    assert settings["train_micro_batch_size_per_gpu"] == 16


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
