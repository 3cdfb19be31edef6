import math

import pytest
import torch

from hatnet_core import create_model
from hatnet_train import build_config
from hatnet_train.optim import Schedule, freeze, lr_factor, parameter_groups, set_training_mode


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
    assert lr_factor(5, warmup_steps=5, total_steps=5) == 1.0  # after the last step


def test_the_cosine_leads_to_the_floor():
    factors = [lr_factor(step, warmup_steps=0, total_steps=1000, floor=0.1) for step in range(1000)]
    assert factors[0] == 1.0
    assert factors[500] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=1e-5)


def test_the_schedule_of_a_run_has_its_peak_warm_up_and_floor():
    values = {"epochs": 10, "warmup_epochs": 2, "lr": 1e-3, "lr_batch_size": 16, "min_lr": 1e-4}
    schedule = Schedule.of(build_config("digits", values), steps_per_epoch=5)
    rates = [schedule(step) for step in range(50)]
    assert rates[0] == pytest.approx(2e-3 / 10)
    assert max(rates) == rates[9] == rates[10] == 2e-3
    assert schedule(50) == pytest.approx(2e-4)


def test_biases_and_norms_alone_are_free_of_weight_decay():
    with torch.device("meta"):
        model = create_model("hatnet_tiny")
    decayed, free = parameter_groups(model, 0.05)
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    assert all(names[id(p)].endswith(".weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith(".bias") or "norm" in names[id(p)] for p in free["params"])


def test_the_rate_falls_by_the_decay_from_block_to_block_down_to_the_stem():
    with torch.device("meta"):
        model = create_model("hatnet_tiny")
    groups = parameter_groups(model, 0.05, 0.5)
    depths = {}
    for group in groups:
        for p in group["params"]:
            depths[id(p)] = -math.log2(group["lr_scale"])
    by_name = {name: depths[id(p)] for name, p in model.named_parameters()}
    blocks = [(i, j) for i, stage in enumerate(model.stages) for j in range(len(stage.blocks))]
    from_the_top = {block: len(blocks) - place for place, block in enumerate(blocks)}
    for name, depth in by_name.items():
        part = name.split(".")
        if part[0] == "stages" and part[2] == "blocks":
            assert depth == from_the_top[int(part[1]), int(part[3])], name
    assert by_name["head.weight"] == 0
    assert by_name["stem.conv1.weight"] == len(blocks) + 1 == max(depths.values())
    exempt = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert exempt == {id(p) for p in model.parameters() if p.ndim == 1}


def test_a_frozen_backbone_is_in_no_group_and_in_evaluation_mode():
    with torch.device("meta"):
        model = create_model("hatnet_tiny", drop_path_rate=0.1)
    freeze(model)
    for layer_decay in (1.0, 0.5):
        chosen = [p for group in parameter_groups(model, 0.05, layer_decay) for p in group["params"]]
        assert {id(p) for p in chosen} == {id(model.head.weight), id(model.head.bias)}
    set_training_mode(model)
    assert [module.training for module in (model.stem, model.stages, model.head_drop, model.head)] == [False] * 2 + [
        True
    ] * 2
    model.requires_grad_(True)
    set_training_mode(model)
    assert all(module.training for module in model.modules())


def test_a_limit_of_steps_shortens_warm_up_and_cosine_alike():
    values = {"epochs": 10, "warmup_epochs": 2, "lr": 1e-3}
    whole = Schedule.of(build_config("digits", values), steps_per_epoch=6)
    half = Schedule.of(build_config("digits", {**values, "max_steps": 30}), steps_per_epoch=6)
    assert (half.warmup_steps, half.total_steps) == (6, 30)
    assert [half(step) for step in range(6, 30)] == pytest.approx([whole(2 * step) for step in range(6, 30)])
    assert Schedule.of(build_config("digits", {**values, "max_steps": 90}), steps_per_epoch=6) == whole
