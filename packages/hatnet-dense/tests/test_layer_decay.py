"""Layers of parameters, and learning rates of the optimizer."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from torch import nn

from hatnet_core import create_model
from hatnet_dense import HATNetBackbone
from hatnet_dense.layer_decay import layer_of
from hatnet_testing import raises

LR, DECAY, RATE = 1e-3, 0.05, 0.8
DEPTHS = [2, 2, 6, 3]  # Tiny, Table 1


class Detector(BaseModule):
    """Model with a backbone and a head, as in both libraries."""

    def __init__(self, **arguments):
        super().__init__()
        self.backbone = HATNetBackbone(**arguments)
        self.head = nn.Conv2d(384, 4, 1)


def wrapper(model, **paramwise):
    return build_optim_wrapper(
        model,
        {
            "constructor": "LayerDecayConstructor",
            "paramwise_cfg": paramwise,
            "optimizer": {"type": "AdamW", "lr": LR, "weight_decay": DECAY},
        },
    )


def rates(model, optim_wrapper):
    by_identity = {id(p): group for group in optim_wrapper.optimizer.param_groups for p in group["params"]}
    return {name: by_identity[id(p)] for name, p in model.named_parameters() if id(p) in by_identity}


def test_every_parameter_is_in_one_group_and_its_rate_falls_with_its_distance_from_the_head():
    model = Detector()
    groups = rates(model, wrapper(model, decay_rate=RATE))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    count = sum(len(group["params"]) for group in wrapper(model, decay_rate=RATE).optimizer.param_groups)
    assert count == len(groups)
    after = sum(DEPTHS) + 1  # blocks, and the head
    expected = {
        "head.weight": LR,
        "backbone.model.stem.conv1.weight": LR * RATE**after,
        "backbone.model.stages.0.blocks.0.attn.qkv.weight": LR * RATE ** (after - 1),
        "backbone.model.stages.1.downsample.conv.weight": LR * RATE ** (after - 3),
        "backbone.model.stages.1.blocks.0.mlp.expand.weight": LR * RATE ** (after - 3),
        "backbone.model.stages.3.blocks.2.mlp.expand.weight": LR * RATE,
    }
    for name, rate in expected.items():
        assert groups[name]["lr"] == pytest.approx(rate, rel=1e-12), name


def test_the_scales_are_those_of_timm_on_the_same_model():
    optim = pytest.importorskip("timm.optim")
    model = create_model("hatnet_tiny", num_classes=0)
    by_identity = {id(p): name for name, p in model.named_parameters()}
    groups = optim.param_groups_layer_decay(model, layer_decay=0.5)  # by the model's group_matcher
    theirs = {by_identity[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    ours = {name: 0.5 ** -layer_of(f"backbone.model.{name}", DEPTHS) for name in theirs}
    stem = "stem.conv1.weight"
    assert {name: scale / ours[stem] for name, scale in ours.items()} == {
        name: scale / theirs[stem] for name, scale in theirs.items()
    }


def test_vectors_take_no_weight_decay_and_matrices_do():
    model = Detector()
    for name, group in rates(model, wrapper(model, decay_rate=RATE)).items():
        assert group["weight_decay"] == (DECAY if model.get_parameter(name).ndim > 1 else 0.0), name


def test_a_rate_of_one_is_the_plain_optimizer():
    model = Detector()
    assert {group["lr"] for group in wrapper(model, decay_rate=1).optimizer.param_groups} == {LR}


def test_an_optimizer_without_weight_decay_trains():
    model = Detector()
    plain = {"type": "SGD", "lr": LR}
    constructed = {"constructor": "LayerDecayConstructor", "paramwise_cfg": {"decay_rate": RATE}, "optimizer": plain}
    optimizer = build_optim_wrapper(model, constructed)
    optimizer.update_params(model.head(model.backbone(torch.randn(1, 3, 64, 64))[-1]).square().mean())


def test_frozen_stages_are_left_out():
    model = Detector(frozen_stages=2)
    groups = rates(model, wrapper(model, decay_rate=RATE))
    assert not any(name.startswith(("backbone.model.stem", "backbone.model.stages.0")) for name in groups)
    assert any(name.startswith("backbone.model.stages.2") for name in groups)


def test_a_step_moves_early_layers_less():
    torch.manual_seed(0)
    model = Detector()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = wrapper(model, decay_rate=0.5)
    loss = model.head(model.backbone(torch.randn(1, 3, 96, 96))[-1]).square().mean()
    optimizer.update_params(loss)
    moved = {name: (p.detach() - before[name]).abs().max() for name, p in model.named_parameters()}
    stem, head = moved["backbone.model.stem.conv2.weight"], moved["head.weight"]
    assert 0 < stem < head * 0.5**10


@pytest.mark.parametrize(
    "paramwise",
    [{}, {"decay_rate": 0}, {"decay_rate": True}, {"decay_rate": 1.1}, {"decay_rate": 0.9, "num_layers": 6}],
)
def test_a_rate_that_is_none_is_refused_with_its_value(paramwise):
    with raises(ValueError, "paramwise_cfg", "decay_rate", paramwise):
        wrapper(Detector(), **paramwise)


def test_another_backbone_is_refused():
    model = Detector()
    model.backbone = nn.Conv2d(3, 4, 1)
    with raises(ValueError, "HATNetBackbone", "Conv2d"):
        wrapper(model, decay_rate=RATE)


def test_an_optimizer_without_a_learning_rate_is_refused():
    constructed = {"constructor": "LayerDecayConstructor", "paramwise_cfg": {"decay_rate": RATE}}
    with raises(ValueError, "optimizer.lr", "'lr': None"):
        build_optim_wrapper(Detector(), {**constructed, "optimizer": {"type": "AdamW", "lr": None}})
