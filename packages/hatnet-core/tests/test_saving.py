"""Files of save_checkpoint can be loaded; models that could not be restored are refused, with the remedy."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from conftest import SMALL
from hatnet_core import HATNet, load_checkpoint, read_metadata, save_checkpoint
from hatnet_core.checkpoint import load_model
from hatnet_core.export import export_program, largest_difference
from hatnet_core.hub import HubHATNet
from hatnet_core.pretrained import load_pretrained
from hatnet_testing import raises

IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)


def logits(model):
    with torch.no_grad():
        return model.eval()(IMAGE)


@pytest.mark.parametrize(("head", "num_classes"), [(nn.Linear(24, 3), 3), (nn.Linear(24, 5), 5), (nn.Identity(), 0)])
def test_a_plain_head_is_saved_with_its_own_number_of_classes(head, num_classes, small_model, tmp_path):
    small_model.head = head
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert (again.num_classes, again.config.num_classes) == (num_classes, num_classes)
    assert torch.equal(logits(again), logits(small_model))


def test_a_plain_head_is_saved_to_the_hub_with_its_own_number_of_classes(tmp_path):
    model = HubHATNet(**SMALL, num_classes=5)
    model.head = nn.Linear(24, 3)
    model.save_pretrained(tmp_path)
    again = HubHATNet.from_pretrained(tmp_path)
    assert again.num_classes == 3
    assert "3 classes" in (tmp_path / "README.md").read_text()
    assert torch.equal(logits(again), logits(model))


LINEAR = ["qkv", "q", "kv", "proj", "expand", "project", "head"]
"""Linear layers of a HAT-Net, most of them as convolutions of 1×1."""


def peft_model(model, targets=LINEAR):
    """``model`` itself with LoRA on layers of these names, drawn so that it has an effect."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))


def with_head(model):
    model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(24, 3))


def with_headless_bias(model):
    model.head = nn.Linear(24, 3, bias=False)


def with_lora(model):
    peft_model(model, LINEAR)


def with_parametrization(model):
    parametrizations.weight_norm(model.stem.conv2)


def with_pruning(model):
    prune.l1_unstructured(model.stem.conv2, "weight", 0.5)


def with_compiled_stage(model):
    model.stages[1] = compiled(model.stages[1])


def with_grid(model):
    model.stages[0].blocks[0].attn.grid_size = 4


def with_activation(model):
    model.stages[1].blocks[0].mlp.act2 = nn.ReLU()


def with_nan(model):
    nn.init.constant_(model.stem.conv1.bias, float("nan"))


def on_meta(model):
    model.to("meta")


def with_integers(model):
    model.stem.conv1.bias = nn.Parameter(torch.zeros(16, dtype=torch.int64), requires_grad=False)


REFUSED = {
    with_head: ("head.1.bias", "head.1.weight", "reset_classifier(num_classes)"),
    with_headless_bias: ("head.bias", "reset_classifier(num_classes)"),
    with_lora: ("base_layer", "merge_and_unload()"),
    with_parametrization: ("stem.conv2.parametrizations", "remove_parametrizations()"),
    with_pruning: ("stem.conv2.weight_orig", "torch.nn.utils.prune.remove()"),
    with_compiled_stage: ("stages.1._orig_mod", "compile()"),
    with_grid: ("stages.0.blocks.0.attn", "grid_size=4", "grid_size=8", "set_grid()"),
    with_activation: ("stages.1.blocks.0.mlp.act2", "ReLU()", "SiLU()", "torch.save()"),
    with_nan: ("finite", "stem.conv1.bias"),
    on_meta: ("meta", "to_empty()"),
    with_integers: ("stem.conv1.bias", torch.int64),
}


@pytest.mark.parametrize(("change", "named"), REFUSED.items(), ids=[change.__name__ for change in REFUSED])
def test_a_model_that_would_not_come_back_is_refused_with_the_way_out(change, named, small_model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(small_model, path)
    before = path.read_bytes()
    change(small_model)
    with raises(ValueError, path, *named) as error:
        save_checkpoint(small_model, path)
    assert len(str(error.value).splitlines()) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize("targets", [*([name] for name in LINEAR), LINEAR], ids=" ".join)
def test_a_merged_peft_model_is_saved_and_comes_back(targets, small_model, tmp_path):
    plain = logits(small_model)
    adapted = peft_model(small_model, targets)
    expected = logits(adapted)
    assert not torch.allclose(expected, plain)
    save_checkpoint(adapted.merge_and_unload(), tmp_path / "m.safetensors")
    torch.testing.assert_close(logits(load_model(tmp_path / "m.safetensors")), expected)


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = [compiled, nn.DataParallel, averaged, lambda model: compiled(nn.DataParallel(model))]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_every_function_takes_a_wrapped_model_for_the_one_inside(wrap, small_model, tmp_path):
    wrapped, path = wrap(small_model), tmp_path / "m.safetensors"
    save_checkpoint(wrapped, path)
    assert read_metadata(path)["config"]["num_classes"] == 5
    assert torch.equal(logits(load_model(path)), logits(small_model))
    other = HATNet(**small_model.config)
    assert load_checkpoint(wrap(other), path) == []
    if wrap is not averaged:  # that is a copy
        assert torch.equal(other.head.weight, small_model.head.weight)
    program = export_program(wrapped, (64, 64), static=True)
    torch.export.save(program, tmp_path / "m.pt2")
    assert largest_difference(wrapped, tmp_path / "m.pt2", [(1, 64, 64)]) < 1e-5


class Segmenter(nn.Module):
    def __init__(self, hatnet):
        super().__init__()
        self.backbone, self.neck = hatnet, nn.Conv2d(24, 8, 1)


class Owner(nn.Module):
    """An attribute named as that of DataParallel, and more parameters than the HAT-Net's."""

    def __init__(self, hatnet):
        super().__init__()
        self.module, self.neck = hatnet, nn.Conv2d(24, 8, 1)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda model: peft_model(copy.deepcopy(model)), ("PeftModel", "merge_and_unload()")),
        (Segmenter, ("Segmenter", "backbone")),
        (Owner, ("Owner", "module")),
        (lambda model: nn.Linear(3, 3), ("Linear",)),
        (lambda model: "hatnet_tiny", ("str",)),
    ],
)
def test_every_function_refuses_what_is_not_a_hatnet(build, named, small_model, tmp_path):
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    model = build(small_model)
    for function in (
        lambda: save_checkpoint(model, tmp_path / "x.safetensors"),
        lambda: load_checkpoint(model, tmp_path / "m.safetensors"),
        lambda: load_pretrained(model, "hatnet_tiny"),
        lambda: export_program(model),
    ):
        with raises(TypeError, "model", "HATNet", *named):
            function()
