"""Checkpoints of other programs: where their weights are found, what is reported, and what a message may cost."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import resnet18

from hatnet_core import HATNet, load_checkpoint, save_checkpoint
from hatnet_core.checkpoint import load_model, read_state
from hatnet_testing import check, raises


@pytest.fixture
def other(small_model):
    return HATNet(**small_model.config)


def state_of(model, prefix="", value=None):
    state = model.state_dict()
    return {f"{prefix}{n}": t.clone() if value is None else torch.full_like(t, value) for n, t in state.items()}


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state, "epoch": 3},
        lambda state: {"net": {"weights": state}, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        lambda state: {"callbacks": {"Ema": {"best": 1.0}}, "student": state},
        lambda state: {"optimizer": {"exp_avg": {n: torch.zeros_like(t) for n, t in state.items()}}, "weights": state},
        lambda state: {**state, "epoch": 3},
    ],
)
@pytest.mark.parametrize("prefix", ["", "net.", "self.net.", "model.backbone.encoder."])
def test_weights_are_found_in_any_dict_behind_any_prefix(wrap, prefix, small_model, other, tmp_path):
    torch.save(wrap(state_of(small_model, prefix)), tmp_path / "x.pth")
    assert load_checkpoint(other, tmp_path / "x.pth") == []
    assert same(other, small_model)


def test_what_is_next_to_the_prefix_is_reported(small_model, other, tmp_path, caplog):
    state = state_of(small_model, "self.net.") | {"criterion.weight": torch.ones(5), "n_averaged": torch.tensor(3)}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.5"}, tmp_path / "x.ckpt")
    assert load_checkpoint(other, tmp_path / "x.ckpt") == ["criterion.weight", "n_averaged"]
    check(caplog.text, tmp_path / "x.ckpt", 2, "criterion.weight", "n_averaged")
    assert same(other, small_model)


@pytest.mark.parametrize("order", [("model", "model_ema"), ("model_ema", "model")])
@pytest.mark.parametrize("key", [None, "model", "model_ema"])
def test_of_weights_and_their_average_the_weights_are_taken_unless_a_key_says_otherwise(
    order, key, small_model, other, tmp_path, caplog
):
    sets = {"model": state_of(small_model), "model_ema": state_of(small_model, "module.", 0.5)}
    torch.save({name: sets[name] for name in order}, tmp_path / "x.pth")
    assert load_checkpoint(other, tmp_path / "x.pth", key=key) == []
    average = HATNet(**small_model.config)
    average.load_state_dict(state_of(small_model, value=0.5))
    assert same(other, average if key == "model_ema" else small_model)
    if key is None:
        check(caplog.text, tmp_path / "x.pth", "'model'", "key", "'model_ema.module'")
    assert ("model_ema" in caplog.text) == (key is None)


def test_student_and_teacher_in_one_dict_are_told_apart_by_prefix(small_model, other, tmp_path):
    state = state_of(small_model, "teacher.", 0.5) | state_of(small_model, "student.")
    save_file(state, tmp_path / "x.safetensors")
    dropped = load_checkpoint(other, tmp_path / "x.safetensors")
    assert same(other, small_model)
    assert sorted(dropped) == sorted(name for name in state if name.startswith("teacher."))
    load_checkpoint(other, tmp_path / "x.safetensors", key="teacher")
    assert (other.head.bias == 0.5).all()


def test_the_set_with_all_names_of_the_model_is_taken(small_model, other, tmp_path):
    headless = {name: t for name, t in state_of(small_model, value=0.5).items() if not name.startswith("head.")}
    torch.save({"state_dict": headless, "classifier": state_of(small_model)}, tmp_path / "x.pth")
    load_checkpoint(other, tmp_path / "x.pth")
    assert same(other, small_model)


def test_a_key_that_leads_to_no_weights_is_refused_with_those_that_do(small_model, tmp_path):
    torch.save({"model": state_of(small_model), "model_ema": state_of(small_model)}, tmp_path / "x.pth")
    with raises(ValueError, tmp_path / "x.pth", "key", "model", "model_ema", "'ema'"):
        read_state(tmp_path / "x.pth", "ema")


def test_the_moments_of_an_optimizer_are_not_weights(small_model, other, tmp_path):
    torch.save({"optimizer": {"exp_avg": state_of(small_model)}, "epoch": 3}, tmp_path / "x.pth")
    with raises(ValueError, tmp_path / "x.pth", "dict", "tensors"):
        load_checkpoint(other, tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {f"layer{i}.some_long_name.weight": torch.zeros(1) for i in range(2000)}},
        {"x" * 50_000: torch.zeros(1)},
        {"state_dict": {f"stages.{i}.blocks.0.norm.weight": torch.zeros(1) for i in range(500)}},
        {"a": {"b": {"stem.conv1.weight": torch.zeros(1)}}},
    ],
)
def test_a_message_about_a_foreign_file_is_short(content, other, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with raises(ValueError, tmp_path / "x.pth") as error:
        load_checkpoint(other, tmp_path / "x.pth")
    assert len(str(error.value)) < 2000
    assert error.value.__cause__ is None


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_another_network_is_refused_by_the_names_of_its_parameters(save, other, tmp_path):
    path = tmp_path / "x.safetensors" if save is save_file else tmp_path / "x.pth"
    save(resnet18().state_dict(), path)
    with raises(ValueError, path, "bn1.weight", "conv1.weight") as error:
        load_checkpoint(other, path)
    assert "running" not in str(error.value)
    assert "num_batches_tracked" not in str(error.value)


def test_a_model_is_built_once_without_drawing_weights(small_model, tmp_path):
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    before = torch.random.get_rng_state()
    model = load_model(tmp_path / "m.safetensors")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert model.head.weight.device.type == "cpu"
