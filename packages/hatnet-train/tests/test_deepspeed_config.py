import pytest
import torch

from hatnet_core import create_model
from hatnet_train import build_config
from hatnet_train.deepspeed_config import deepspeed_config, parameter_groups


def test_the_global_batch_is_shared_by_the_processes():
    settings = deepspeed_config(build_config("digits", {}), steps_per_epoch=44, world_size=2)
    assert settings["train_batch_size"] == 32
    assert settings["train_micro_batch_size_per_gpu"] == 16


def test_the_schedule_covers_the_whole_run():
    settings = deepspeed_config(build_config("digits", {"epochs": 9}), steps_per_epoch=44, world_size=1)
    assert settings["scheduler"]["params"]["total_num_steps"] == 396
    assert settings["scheduler"]["params"]["warmup_num_steps"] == 119


def test_a_batch_that_the_processes_cannot_share_is_refused():
    expected = "batch_size must be a multiple of the number of processes, got 32 on 3"
    with pytest.raises(ValueError, match=expected):
        deepspeed_config(build_config("digits", {}), steps_per_epoch=44, world_size=3)


def test_biases_and_norms_alone_are_free_of_weight_decay():
    with torch.device("meta"):
        model = create_model("hatnet_tiny")
    decayed, free = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert all(names[id(p)].endswith(".weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith(".bias") or "norm" in names[id(p)] for p in free["params"])
