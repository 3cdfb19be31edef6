"""The layers that docs/adapt.md names for LoRA and quantisation."""

import pytest
import torch

from conftest import SMALL
from hatnet_core.transformers import HATNetConfig, HATNetForImageClassification
from hatnet_testing import raises

peft = pytest.importorskip("peft")

ATTENTION = ["qkv", "q", "kv", "proj"]
PROJECTIONS = [*ATTENTION, "expand", "project"]


@pytest.fixture
def model():
    return HATNetForImageClassification(HATNetConfig(**SMALL, num_labels=3))


def adapted(model):
    return {name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if ".lora_A" in name}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft calls transformers' old name
@pytest.mark.parametrize("targets", [ATTENTION, PROJECTIONS, ["downsample.conv"]], ids=" ".join)
def test_lora_trains_the_named_layers_and_the_classifier_alone_and_merges(targets, model):
    image = torch.randn(2, 3, 64, 64)
    config = peft.LoraConfig(target_modules=targets, r=2, modules_to_save=["head"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    assert adapted(tuned) == {target.rpartition(".")[2] for target in targets}
    tuned(pixel_values=image, labels=torch.tensor([0, 2])).loss.backward()
    with_gradient = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert with_gradient == {
        name for name, _ in tuned.named_parameters() if "lora_" in name or "modules_to_save" in name
    }
    tuned.eval()
    with torch.no_grad():
        expected = tuned(pixel_values=image).logits
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(pixel_values=image).logits, expected, rtol=1e-4, atol=1e-4)
    fresh = HATNetForImageClassification(HATNetConfig(**SMALL, num_labels=3))
    assert merged.state_dict().keys() == fresh.state_dict().keys()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_all_linear_adapts_the_classifier_alone(model):
    assert adapted(peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))) == {"head"}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning", "ignore:LoRA adapter added:UserWarning")
def test_the_depthwise_convolution_is_refused_by_peft(model):
    with raises(ValueError, "groups", 16):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["dwconv"], r=2))


def test_the_classifier_is_the_only_linear_layer(model):
    assert [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)] == ["hatnet.head"]
