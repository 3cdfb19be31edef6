import json

import pytest

from hatnet_testing import raises
from hatnet_train import build_config
from hatnet_train.deepspeed.config import deepspeed_config, unread_keys
from hatnet_train.deepspeed.user_json import fields_of, read_deepspeed_json


@pytest.fixture
def written(tmp_path):
    """Write a configuration and read it as the command line does."""

    def written(content):
        (tmp_path / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return read_deepspeed_json(tmp_path / "ds.json")

    return written


def test_a_users_own_json_gives_fields_and_keeps_what_is_only_his(written):
    user = written(
        {
            "train_batch_size": 64,
            "gradient_clipping": 1,
            "zero_optimization": {"stage": 2, "overlap_comm": False},
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-4, "eps": 1e-6}},
            "wall_clock_breakdown": False,
        }
    )
    fields = fields_of(user)
    expected = {"batch_size": 64, "clip_grad": 1.0, "zero_stage": 2, "lr": 5e-4, "precision": "bf16"}
    assert fields == {**expected, "lr_batch_size": 0}
    settings = deepspeed_config(build_config("digits", fields), world_size=2, user=user)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert settings["optimizer"]["params"]["eps"] == 1e-6
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.999]
    assert "torch_autocast" not in settings
    assert settings["wall_clock_breakdown"] is False
    assert settings["train_micro_batch_size_per_gpu"] == 32


def test_values_that_are_auto_are_ours(written):
    user = written(
        {
            "train_batch_size": "auto",
            "zero_optimization": {"stage": "auto", "reduce_scatter": True},
            "bf16": {"enabled": "auto"},
            "fp16": {"enabled": "auto", "loss_scale": 0},
        }
    )
    assert fields_of(user) == {}
    settings = deepspeed_config(build_config("digits", {"zero_stage": 1}), world_size=1, user=user)
    assert settings["train_batch_size"] == 32
    assert settings["zero_optimization"] == {"stage": 1, "reduce_scatter": True}
    assert "bf16" not in settings


@pytest.mark.parametrize("section", [{"fp16": {"enabled": False}}, {"bf16": {"enabled": "auto"}}, {"bf16": {}}])
def test_a_section_that_is_not_enabled_leaves_the_precision_to_the_recipe(section, written):
    user = written(section)
    assert "precision" not in fields_of(user)
    settings = deepspeed_config(build_config("digits", {"precision": "bf16"}), world_size=1, user=user)
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}


@pytest.mark.parametrize("name", ["bf16", "torch_autocast"])
def test_the_recipes_own_precision_cannot_be_switched_off_by_the_way(name, written):
    user = written({name: {"enabled": False}})
    with raises(ValueError, name, "bf16", "--precision"):
        deepspeed_config(build_config("digits", {"precision": "bf16"}), world_size=1, user=user)
    deepspeed_config(build_config("digits", {"precision": "fp32"}), world_size=1, user=user)


def test_autocast_of_the_file_gives_the_precision_but_not_in_float16_under_zero(written):
    user = written({"torch_autocast": {"enabled": True, "dtype": "float16"}})
    assert fields_of(user) == {"precision": "fp16"}
    deepspeed_config(build_config("digits", fields_of(user)), world_size=1, user=user)
    with raises(ValueError, "torch_autocast", "float16", "fp16"):
        deepspeed_config(build_config("digits", {**fields_of(user), "zero_stage": 2}), world_size=1, user=user)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", ["JSON"]),
        ("[1]", ["object", [1]]),
        ({"train_batch_size": "64"}, ["train_batch_size", "int", "'64'"]),
        ({"zero_optimization": True}, ["zero_optimization", True]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage", "int", True]),
        ({"optimizer": "AdamW"}, ["optimizer", "'AdamW'"]),
        ({"optimizer": {"params": [1]}}, ["optimizer.params", [1]]),
        ({"optimizer": {"type": "SGD"}}, ["optimizer", "AdamW", '{"type": "SGD"}']),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, ["optimizer", "AdamW", "adam_w_mode"]),
        ({"bf16": True}, ["bf16", True]),
        ({"bf16": {"enabled": "yes"}}, ["bf16.enabled", "'yes'"]),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["precision", "bf16", "fp16"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float8"}}, ["dtype", "bfloat16", "float16", "'float8'"]),
        ({"torch_autocast": {"enabled": True, "dtype": ["x"]}}, ["dtype", "bfloat16", "float16", ["x"]]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "--warmup-epochs"]),
    ],
)
def test_a_wrong_file_is_refused_by_path(content, named, written, tmp_path):
    with raises(ValueError, tmp_path / "ds.json", *named):
        written(content)


def test_another_micro_batch_is_refused(written):
    user = written({"train_micro_batch_size_per_gpu": 4})
    with raises(ValueError, "train_micro_batch_size_per_gpu", 4, "--batch-size 32", 16):
        deepspeed_config(build_config("digits", {}), world_size=2, user=user)


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_states_elsewhere_than_on_the_devices_are_refused(name, written, tmp_path):
    with raises(ValueError, tmp_path / "ds.json", f"zero_optimization.{name}"):
        written({"zero_optimization": {"stage": 2, name: {"device": "cpu"}}})
    written({"zero_optimization": {"stage": 2, name: {"device": "none"}}})


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_section_of_half_precision_needs_zero(name, written):
    user = written({name: {"enabled": True}})
    with raises(ValueError, name, "--zero-stage", 0, f"--precision {name}", "torch_autocast"):
        deepspeed_config(build_config("digits", fields_of(user)), world_size=2, user=user)


def test_deepspeeds_own_optimizer_is_not_given_what_only_torchs_knows(written):
    user = written({"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}})
    settings = deepspeed_config(build_config("digits", fields_of(user)), world_size=1, user=user)
    assert "fused" not in settings["optimizer"]["params"]


def test_keys_that_deepspeed_ignores_are_found(written):
    content = {"train_batch_size": 8, "gradient_cliping": 1.0, "wall_clock_breakdown": False, "no such thing": 1}
    user = written({**content, "sequence_parallel_size": 1, "data_parallel_size": 1})
    assert unread_keys(user) == {"gradient_cliping": "gradient_clipping", "no such thing": ""}


def test_every_key_of_a_run_is_one_that_deepspeed_looks_up():
    """It fails if DeepSpeed parses its configuration in another way, which would make all keys seem ignored."""
    for values in ({}, {"precision": "bf16"}, {"precision": "fp16", "zero_stage": 1}):
        assert unread_keys(deepspeed_config(build_config("digits", values), world_size=1)) == {}


def test_deepspeed_refuses_what_it_no_longer_supports(written):
    with raises(Exception, "elasticity"):
        unread_keys(written({"train_batch_size": 8, "elasticity": {"enabled": True}}))
