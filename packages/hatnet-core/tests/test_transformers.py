import pytest
import torch
from torch.export import Dim
from transformers import AutoBackbone, AutoConfig, UperNetConfig, UperNetForSemanticSegmentation

from conftest import SMALL
from hatnet_core import HATNet, create_model, load_checkpoint, save_checkpoint
from hatnet_core.transformers import HATNetBackbone, HATNetConfig
from hatnet_testing import raises


@pytest.fixture
def backbone():
    return AutoBackbone.from_config(HATNetConfig(**SMALL, out_features=["stage2", "stage4"])).eval()


def test_auto_backbone_builds_it_from_its_configuration(backbone):
    assert isinstance(backbone, HATNetBackbone)
    assert backbone.out_indices == [2, 4]
    assert backbone.channels == [16, 24]
    assert backbone.num_features == [8, 8, 16, 16, 24]


def test_the_maps_are_those_of_hatnet(backbone):
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        output = backbone(image, output_hidden_states=True)
        torch.testing.assert_close(list(output.feature_maps), backbone.hatnet.forward_intermediates(image, (1, 3)))
        assert [m.shape[1:] for m in output.hidden_states] == [
            (8, 16, 24), (8, 16, 24), (16, 8, 12), (16, 4, 6), (24, 2, 3)
        ]  # fmt: skip
        assert backbone(image).hidden_states is None
        assert torch.equal(backbone(image, return_dict=False)[0][1], output.feature_maps[1])


def test_a_saved_backbone_comes_back_the_same(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    again = HATNetBackbone.from_pretrained(tmp_path)
    assert not again.training
    assert AutoConfig.from_pretrained(tmp_path).out_features == ["stage2", "stage4"]
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(image).feature_maps, backbone(image).feature_maps)


def test_classification_weights_load_into_it(backbone, tmp_path):
    save_checkpoint(HATNet(**SMALL, num_classes=7), tmp_path / "m.safetensors")
    load_checkpoint(backbone.hatnet, tmp_path / "m.safetensors", drop_head=True)
    assert AutoBackbone.from_config(HATNetConfig(**SMALL)).hatnet.config == backbone.hatnet.config


@pytest.mark.parametrize("attention", ["hierarchical", "window"])
def test_fresh_weights_are_drawn_as_hatnet_draws_them(attention):
    backbone = AutoBackbone.from_config(HATNetConfig(attention=(attention,) * 3))
    weights = dict(backbone.hatnet.named_parameters())
    assert weights["stages.2.downsample.conv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    for name, p in weights.items():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        elif "bias_table" in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name


def test_it_is_the_backbone_of_a_segmenter_of_transformers():
    config = UperNetConfig(
        backbone_config=HATNetConfig(**SMALL, out_indices=[1, 2, 3, 4]),
        num_labels=5,
        hidden_size=16,
        auxiliary_in_channels=16,
    )
    model = UperNetForSemanticSegmentation(config)
    output = model(torch.randn(2, 3, 64, 96), labels=torch.randint(5, (2, 64, 96)))
    assert output.logits.shape == (2, 5, 64, 96)
    output.loss.backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


@pytest.mark.parametrize("out_features", [["stage5"], ["stage2", "stage1"]])
def test_maps_that_are_not_there_are_refused(out_features):
    with raises(ValueError, "out_features"):
        HATNetConfig(out_features=out_features)


def test_images_of_the_wrong_kind_are_refused(backbone):
    with raises(ValueError, "input", "B×3×H×W", (3, 64, 64)):
        backbone(torch.randn(3, 64, 64))


def test_stages_behind_the_last_map_are_not_computed():
    backbone = AutoBackbone.from_config(HATNetConfig(**SMALL, out_features=["stem", "stage1"]))
    backbone.hatnet.stages[1].forward = None
    assert len(backbone(torch.randn(1, 3, 64, 64)).feature_maps) == 2


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_:FutureWarning")  # newer versions have another name for it
def test_gradient_checkpointing_is_switched_through_transformers(backbone):
    backbone.gradient_checkpointing_enable()
    assert [stage.grad_checkpointing for stage in backbone.hatnet.stages] == [True] * 4
    backbone.gradient_checkpointing_disable()
    assert [stage.grad_checkpointing for stage in backbone.hatnet.stages] == [False] * 4


def test_it_exports_with_dynamic_sizes(backbone):
    sizes = {0: Dim("batch"), 2: Dim("height", min=32), 3: Dim("width", min=32)}
    program = torch.export.export(backbone, (torch.randn(2, 3, 96, 128),), dynamic_shapes={"pixel_values": sizes})
    image = torch.randn(1, 3, 75, 50)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image).feature_maps, backbone(image).feature_maps)


def test_sdpa_can_be_asked_for_and_flash_attention_is_refused(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    again = HATNetBackbone.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert again.config._attn_implementation == "sdpa"
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(image).feature_maps[0], backbone(image).feature_maps[0])
    with raises(ValueError, "Flash Attention"):
        HATNetBackbone.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_the_configuration_has_the_arguments_of_hatnet_and_its_defaults():
    model = create_model("hatnet_small", num_classes=0)
    arguments = HATNetConfig().hatnet_arguments()
    assert arguments == {name: model.config[name] for name in arguments}
    assert {"global_pool", "drop_rate"} == model.config.keys() - arguments.keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.pin_memory:UserWarning")
def test_trainer_of_transformers_trains_and_saves_a_hatnet(small_model, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    class ClassTrainer(Trainer):
        def compute_loss(self, model, inputs, **_):
            return torch.nn.functional.cross_entropy(model(inputs["x"]), inputs["labels"])

    data = [{"x": torch.randn(3, 32, 32), "labels": i % 5} for i in range(8)]
    options = {"report_to": [], "use_cache": False, "use_cpu": True, "remove_unused_columns": False}
    arguments = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4, **options)
    before, arguments_before = small_model.head.weight.clone(), dict(small_model.config)
    trainer = ClassTrainer(small_model, arguments, train_dataset=data)
    assert trainer.train().training_loss > 0
    assert not torch.equal(small_model.head.weight, before)
    assert small_model.config.use_cache is False
    assert small_model.config == arguments_before
    trainer.save_model(tmp_path / "saved")
    again = HATNet(**small_model.config)
    assert load_checkpoint(again, tmp_path / "saved") == []
    assert torch.equal(again.head.weight, small_model.head.weight)
