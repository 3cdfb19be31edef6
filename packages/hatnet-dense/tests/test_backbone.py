import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, Registry

from hatnet_core import HATNet, create_model, list_models, save_checkpoint
from hatnet_core.pretrained import RELEASED_URL
from hatnet_dense import HATNetBackbone
from hatnet_testing import check, raises

CHANNELS = {
    "hatnet_tiny": (48, 96, 240, 384),
    "hatnet_small": (64, 128, 320, 512),
    "hatnet_medium": (64, 128, 320, 512),
    "hatnet_large": (64, 128, 320, 640),
}


def build(**arguments):
    return MODELS.build({"type": "HATNetBackbone", **arguments})


@pytest.fixture
def child_registry():
    """A registry below the root one, as MMDetection and MMSegmentation have."""
    scope = "library_of_the_test"
    yield Registry("model", parent=MODELS, scope=scope)
    del MODELS.children[scope]


def test_it_is_built_by_name_from_the_root_registry():
    assert isinstance(build(), HATNetBackbone)


def test_a_child_registry_falls_back_to_it(child_registry):
    backbone = child_registry.build({"type": "HATNetBackbone", "variant": "hatnet_tiny", "out_indices": (0, 1)})
    assert isinstance(backbone, HATNetBackbone)


def test_it_is_built_from_a_config_file_that_imports_the_package(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        "custom_imports = dict(imports=['hatnet_dense'])\n"
        "backbone = dict(type='HATNetBackbone', out_indices=[1, 3], drop_path_rate=0.1)\n"
    )
    backbone = MODELS.build(Config.fromfile(path).backbone)
    assert backbone.out_indices == (1, 3)


@pytest.mark.parametrize("variant", list_models())
def test_the_maps_of_an_odd_size_have_the_channels_and_reductions_of_the_stages(variant):
    with torch.device("meta"):
        features = build(variant=variant).eval()(torch.empty(2, 3, 75, 101))
    assert isinstance(features, tuple)
    assert [tuple(f.shape) for f in features] == [
        (2, channels, -(-75 // r), -(-101 // r)) for channels, r in zip(CHANNELS[variant], (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2), (3, 0)])
def test_the_maps_are_those_of_the_model_with_the_same_weights_and_the_grids_of_the_dense_tasks(out_indices):
    backbone = build(out_indices=out_indices).eval()
    model = create_model("hatnet_tiny", grid_sizes=(8, 8, 8), pool_sizes=(16, 8, 4)).eval()
    model.load_state_dict(backbone.model.state_dict(), strict=False)
    image = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        for actual, expected in zip(backbone(image), model.forward_intermediates(image, out_indices), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("out_indices", [(0,), (2, 1), (0, 1, 2, 3)])
def test_every_parameter_gets_a_gradient_whatever_is_returned(out_indices):
    backbone = build(out_indices=out_indices, drop_path_rate=0.0)
    features = backbone(torch.randn(1, 3, 96, 96))  # two pooled keys a side: one alone has no gradient
    sum(f.square().mean() for f in features).backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize(
    ("frozen_stages", "stem", "stages"), [(-1, False, 0), (0, True, 0), (2, True, 2), (4, True, 4)]
)
def test_frozen_stages_do_not_train_and_are_in_evaluation_mode(frozen_stages, stem, stages):
    backbone = build(frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    before = ["model.stem."] * stem + [f"model.stages.{i}." for i in range(stages)]
    assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(tuple(before))}
    assert backbone.model.stem.training != stem
    assert [stage.training for stage in backbone.model.stages] == [i >= stages for i in range(4)]
    assert all(module.training != (i < stages) for i in range(4) for module in backbone.model.stages[i].modules())


def test_stages_behind_frozen_ones_still_train():
    backbone = build(frozen_stages=2, with_cp=True).train()
    sum(f.square().mean() for f in backbone(torch.randn(1, 3, 96, 96))).backward()
    trained = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert trained == {
        name for name, _ in backbone.named_parameters() if name.startswith(("model.stages.2", "model.stages.3"))
    }


def test_norm_eval_keeps_the_statistics_of_batch_norms_that_were_put_in():
    for norm_eval in (False, True):
        backbone = build(norm_eval=norm_eval)
        backbone.model.stem.norm = torch.nn.BatchNorm2d(16)
        backbone.train()
        assert backbone.model.stem.norm.training != norm_eval
        assert backbone.model.stages.training


def test_recomputing_the_blocks_gives_the_same_gradients():
    gradients = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = build(with_cp=with_cp).train()
        sum(f.square().mean() for f in backbone(torch.randn(1, 3, 64, 64))).backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("size", [(1333, 800), (800, 1333), (799, 33), (65, 1001)])
def test_g1_and_g2_cope_with_the_sizes_of_detection(size):
    with torch.device("meta"):
        maps = build()(torch.empty(1, 3, *size))
    assert [tuple(f.shape[-2:]) for f in maps] == [tuple(-(-side // r) for side in size) for r in (4, 8, 16, 32)]


def test_an_image_gives_the_same_maps_alone_and_among_others():
    backbone = build().eval()
    image = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        alone = backbone(image)
        among = backbone(torch.cat([image, torch.randn(2, 3, 70, 90)]))
    for one, first in zip(alone, among, strict=True):
        torch.testing.assert_close(first[:1], one, rtol=1e-4, atol=1e-4)


def test_a_run_folder_of_hatnet_train_stands_for_its_weights_and_the_log_says_how_many(tmp_path, caplog):
    save_checkpoint(create_model("hatnet_tiny", num_classes=10), tmp_path / "model.safetensors")
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path)})
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO):
            backbone.init_weights()
    finally:
        logger.removeHandler(caplog.handler)
    check(caplog.text, len(backbone.state_dict()), tmp_path)


def test_a_checkpoint_without_a_name_of_the_model_is_refused_loudly(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "other.pth")})
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with raises(ValueError, tmp_path / "other.pth", "hatnet_tiny"):
        backbone.init_weights()
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_the_address_of_the_released_file_stands_for_it_and_no_other_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    model = create_model("hatnet_tiny")
    torch.save(model.state_dict(), tmp_path / "checkpoints" / "HAT-Net_Tiny.pth")  # as if downloaded
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": f"{RELEASED_URL}/HAT-Net_Tiny.pth"})
    backbone.init_weights()
    torch.testing.assert_close(backbone.model.stem.conv1.weight, model.stem.conv1.weight, rtol=0, atol=0)
    for address in ("https://example.org/model.pth", f"{RELEASED_URL}/HAT-Net_Small.pth"):
        other = build(init_cfg={"type": "Pretrained", "checkpoint": address})
        with raises(ValueError, address):
            other.init_weights()


def test_the_arguments_reach_the_model():
    backbone = build(grid_sizes=(8, 7, 7), pool_sizes=(8, 4, 2), in_chans=5, drop_path_rate=0.25)
    assert backbone.model.config["grid_sizes"] == (8, 7, 7)
    assert backbone.model.config["pool_sizes"] == (8, 4, 2)
    assert backbone.model.config["in_chans"] == 5
    assert backbone.model.stages[3].blocks[-1].drop_path2.rate == 0.25


@pytest.mark.parametrize("name", ["ours.safetensors", "plain.pth"])
def test_init_weights_takes_over_classification_weights(name, tmp_path):
    classifier = create_model("hatnet_tiny", num_classes=10 if name == "ours.safetensors" else 1000)
    if name == "ours.safetensors":
        save_checkpoint(classifier, tmp_path / name)
    else:
        torch.save(classifier.state_dict(), tmp_path / name)
    backbone = build(out_indices=(0, 2), init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / name)})
    backbone.init_weights()
    weights = classifier.state_dict()
    loaded = backbone.model.state_dict()
    assert not any(key.startswith("stages.3") for key in loaded)
    for key, value in loaded.items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0)


def test_weights_that_were_changed_after_loading_are_not_loaded_again(tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=0), tmp_path / "ours.safetensors")
    backbone = build(init_cfg={"type": "Pretrained", "checkpoint": tmp_path / "ours.safetensors"})
    backbone.init_weights()
    torch.nn.init.ones_(backbone.model.stem.conv1.bias)
    backbone.init_weights()
    assert (backbone.model.stem.conv1.bias == 1).all()


def test_init_weights_keeps_the_random_weights_without_a_checkpoint():
    backbone = build()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    logging.disable(logging.INFO)
    try:
        backbone.init_weights()
    finally:
        logging.disable(logging.NOTSET)
    for name, value in backbone.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_checkpoint_that_is_missing_or_of_another_model_is_refused(tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=0), tmp_path / "tiny.safetensors")
    small = build(variant="hatnet_small", init_cfg={"type": "Pretrained", "checkpoint": tmp_path / "tiny.safetensors"})
    with raises(ValueError, tmp_path / "tiny.safetensors", "hatnet_tiny", "hatnet_small"):
        small.init_weights()
    absent = build(init_cfg={"type": "Pretrained", "checkpoint": "absent.pth"})
    with raises(FileNotFoundError, "absent.pth"):
        absent.init_weights()


@pytest.mark.parametrize("frozen_stages", [-2, 5, 1.0, True, None])
def test_frozen_stages_out_of_range_are_refused_with_their_value(frozen_stages):
    with raises(ValueError, "frozen_stages", repr(frozen_stages)):
        build(frozen_stages=frozen_stages)


@pytest.mark.parametrize("out_indices", [(4,), (0, -1), (), 3, (0, 1.0), ("0",)])
def test_out_indices_that_name_no_stage_are_refused_with_their_value(out_indices):
    with raises(ValueError, "out_indices", repr(out_indices)):
        build(out_indices=out_indices)


@pytest.mark.parametrize(
    "init_cfg",
    [
        {"type": "Kaiming", "layer": "Conv2d"},
        {"type": "Pretrained", "checkpoint": "a.pth", "prefix": "backbone."},
        {"type": "Pretrained"},
        [{"type": "Pretrained", "checkpoint": "a.pth"}],
    ],
)
def test_an_init_cfg_that_it_does_not_load_is_refused_with_its_value(init_cfg):
    with raises(ValueError, "init_cfg", repr(init_cfg)):
        build(init_cfg=init_cfg)


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("variant", "resnet", ["'resnet'"]),
        ("grid_sizes", (8, 8), ["grid_sizes", (8, 8)]),
        ("pool_sizes", (16, 8, 0), ["pool_sizes", 0]),
        ("drop_path_rate", 1.5, ["drop_path_rate", 1.5]),
    ],
)
def test_other_arguments_out_of_range_are_refused_with_their_value(name, value, named):
    with raises(ValueError, *named):
        build(**{name: value})


def test_an_image_of_the_wrong_shape_is_refused_with_it():
    with raises(ValueError, "input", (1, 1, 64, 64)):
        build()(torch.zeros(1, 1, 64, 64))


def test_the_model_inside_is_the_one_of_hatnet_core():
    assert isinstance(build().model, HATNet)
