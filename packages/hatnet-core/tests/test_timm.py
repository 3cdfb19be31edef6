"""The contract of timm's own model tests (forward, backward, default cfg, features, intermediates, fx, pretrained)."""

import math

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.models import FeatureInfo, group_parameters
from timm.optim import param_groups_layer_decay
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import hatnet_core.timm
from hatnet_core import create_model, list_models
from hatnet_testing import raises

pytestmark = pytest.mark.long

every_model = pytest.mark.parametrize("name", list_models())
FEATURE_CLASSES = ["list", "dict", "hook", "getter", "fx"]


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order in both of two passes that are compared bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_importing_registers_the_four_models_with_pretrained_weights():
    assert timm.list_models("hatnet*") == sorted(list_models())
    assert timm.list_models("hatnet*", pretrained=True) == sorted(f"{name}.in1k" for name in list_models())
    assert timm.is_model("hatnet_tiny")


@every_model
def test_timm_builds_the_model_of_create_model_with_the_same_parameter_names(name):
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), create_model(name)
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert theirs.config == ours.config | {"drop_rate": 0.2}


@every_model
def test_forward(name):
    model = timm.create_model(name).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, *model.default_cfg["input_size"]))
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()


@every_model
def test_backward_gives_every_parameter_a_gradient(name):
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1).train()
    logits = model(torch.randn(2, 3, 128, 128))
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_default_cfg_describes_the_model(name):
    model = timm.create_model(name).eval()
    cfg, state = model.default_cfg, model.state_dict()
    image = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        features = model.forward_features(image)
        assert features.shape == (1, model.num_features, *cfg["pool_size"])
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model(image).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert torch.equal(model(image), features)
        unpooled = timm.create_model(name, num_classes=0, global_pool="").eval()
        assert unpooled(image).shape == features.shape
    assert state[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], model.num_features)
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]


@every_model
def test_data_config_and_transform_follow_deit(name):
    config = resolve_model_data_config(timm.create_model(name))
    transform = create_transform(**config)
    assert transform.transforms[0].size == 256  # DeiT: the shorter side to 256, then the centre 224×224
    assert transform.transforms[1].size == (224, 224)


@every_model
@pytest.mark.parametrize("feature_cls", FEATURE_CLASSES)
def test_features_only_gives_maps_of_the_channels_and_reductions_it_names(name, feature_cls):
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls).eval()
    with torch.no_grad():
        maps = model(torch.randn(1, 3, 96, 80))
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert reductions == [4, 8, 16, 32]
    shapes = [(1, c, math.ceil(96 / r), math.ceil(80 / r)) for c, r in zip(channels, reductions, strict=True)]
    assert [m.shape for m in maps] == shapes
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("feature_cls", FEATURE_CLASSES)
@pytest.mark.parametrize("out_indices", [(1, 2), (-2,), 2])
def test_out_indices_choose_the_stages_of_the_whole_model(feature_cls, out_indices):
    model = timm.create_model("hatnet_tiny", features_only=True, feature_cls=feature_cls, out_indices=out_indices)
    whole = create_model("hatnet_tiny").eval()
    weights = {
        k.removeprefix("model.").removeprefix("graph_module.").replace("stages_", "stages."): v
        for k, v in model.eval().state_dict().items()
    }
    assert whole.load_state_dict(weights, strict=False).unexpected_keys == []
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps = model(image)
        expected = whole.forward_intermediates(image, out_indices)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize("out_indices", [(4,), (), (0, -5), 0, 9])
def test_out_indices_that_are_not_there_are_refused(out_indices):
    with raises(ValueError, "indices", 3):
        timm.create_model("hatnet_tiny", features_only=True, out_indices=out_indices)


@pytest.mark.parametrize("feature_cls", ["list", "hook", "getter"])
@pytest.mark.parametrize("out_indices", [(3, 1), (-1, 1), (1, 3), [3, 1, 3]])
def test_maps_and_feature_info_agree_whatever_the_order_asked_for(out_indices, feature_cls):
    model = timm.create_model("hatnet_tiny", features_only=True, out_indices=out_indices, feature_cls=feature_cls)
    with torch.no_grad():
        maps = model.eval()(torch.randn(1, 3, 64, 64))
    assert model.feature_info.channels() == [m.shape[1] for m in maps] == [96, 384]
    assert model.feature_info.reduction() == [64 // m.shape[2] for m in maps] == [8, 32]


@pytest.mark.parametrize("features_only", [False, True])
def test_a_model_is_built_on_the_device_and_in_the_dtype_asked_for(features_only):
    model = timm.create_model("hatnet_tiny", device="meta", dtype=torch.bfloat16, features_only=features_only)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    plain = timm.create_model("hatnet_tiny", device="cpu", features_only=features_only)
    assert {(p.device.type, p.dtype) for p in plain.parameters()} == {("cpu", torch.float32)}


@every_model
def test_intermediates_come_as_a_pair_with_the_final_features(name):
    model = timm.create_model(name).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        final, maps = model.forward_intermediates(image, output_fmt="NCHW")
        assert [m.shape[1] for m in maps] == info.channels()
        assert [96 // m.shape[2] for m in maps] == info.reduction()
        torch.testing.assert_close(final, model.forward_features(image))
        early, (first,) = model.forward_intermediates(image, indices=(0,), stop_early=True)
        assert torch.equal(early, first)
        torch.testing.assert_close(model.forward_intermediates(image, 2, intermediates_only=True), maps[2:])
    model.set_grad_checkpointing()
    checkpointed, _ = model.forward_intermediates(image)
    torch.testing.assert_close(checkpointed, final)


@every_model
@pytest.mark.parametrize("last", [0, 2, 3])
def test_pruned_intermediates_keep_the_maps_and_leave_no_parameter_without_gradient(name, last):
    model = timm.create_model(name).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected,) = model.forward_intermediates(image, (last,), intermediates_only=True)
    whole = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers((last,)) == [last]
    (actual,) = model.forward_intermediates(image, (last,), intermediates_only=True)
    torch.testing.assert_close(actual, expected)
    assert sum(p.numel() for p in model.parameters()) < whole
    assert model.num_features == model.feature_info[last]["num_chs"]
    actual.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def fx_model(model):
    # the graphs of the two modes differ by dropout and stochastic depth, which torchvision remarks on
    train, evaluation = get_graph_node_names(model, suppress_diff_warning=True)
    return create_feature_extractor(
        model, train_return_nodes=train[-1:], eval_return_nodes=evaluation[-1:], suppress_diff_warning=True
    )


@every_model
def test_fx_graph_gives_the_same_logits_bit_for_bit_at_any_size(name):
    model = timm.create_model(name).eval()
    graph = fx_model(model)
    with torch.inference_mode():
        for size in ((128, 128), (75, 50)):  # the graph is of no size
            image = torch.randn(1, 3, *size)
            (logits,) = graph(image).values()
            assert torch.equal(logits, model(image))


@every_model
def test_fx_graph_gives_every_parameter_a_gradient(name):
    graph = fx_model(timm.create_model(name, num_classes=42, drop_path_rate=0.1).train())
    (logits,) = graph(torch.randn(2, 3, 128, 128)).values()
    logits.mean().backward()
    assert logits.shape == (2, 42)
    assert [n for n, p in graph.named_parameters() if p.grad is None] == []


@every_model
@pytest.mark.parametrize("coarse", [False, True])
def test_layer_decay_puts_every_parameter_in_a_group_from_stem_to_head(name, coarse):
    with torch.device("meta"):
        model = timm.create_model(name)
    groups = group_parameters(model, model.group_matcher(coarse))
    blocks = sum(model.config["depths"])
    assert len(groups) == (1 + 4 + 1 if coarse else 1 + blocks + 1)  # a downsampling goes with the block behind it
    assert sorted(n for group in groups.values() for n in group) == sorted(n for n, _ in model.named_parameters())
    assert all(n.startswith("stem.") for n in groups[0])
    assert groups[len(groups) - 1] == ["head.weight", "head.bias"]


def test_timms_layer_decay_optimizer_groups_scale_from_the_stem_up():
    model = timm.create_model("hatnet_tiny")
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.head.weight)] == 1.0
    assert scales[id(model.stages[3].blocks[2].attn.qkv.weight)] == 0.5
    assert scales[id(model.stem.conv1.weight)] == min(scales.values())


@pytest.mark.parametrize(("in_chans", "num_classes"), [(3, 1000), (1, 5), (4, 0)])
def test_pretrained_weights_load_from_a_file_with_other_channels_and_classes(
    in_chans, num_classes, released_files, tmp_path
):
    overlay = {"file": str(released_files["hatnet_tiny"])}
    model = timm.create_model(
        "hatnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_chans, num_classes=num_classes
    )
    released = torch.load(released_files["hatnet_tiny"], weights_only=True)
    assert torch.equal(model.stages[2].downsample.conv.weight, released["ds3.conv.weight"])
    stem = released["patch_embed.0.weight"]
    if in_chans == 1:
        torch.testing.assert_close(model.stem.conv1.weight, stem.sum(1, keepdim=True))
    assert model.stem.conv1.weight.shape[1] == in_chans
    assert model.num_classes == num_classes
    if num_classes == 1000:
        assert torch.equal(model.head.weight, released["classifier.1.weight"])


def test_pretrained_cfg_is_taken_by_tag_and_as_a_dict():
    assert timm.create_model("hatnet_tiny", pretrained_cfg="in1k").pretrained_cfg["tag"] == "in1k"
    cfg = timm.get_pretrained_cfg("hatnet_tiny.in1k").to_dict() | {"num_classes": 10, "input_size": (1, 96, 96)}
    model = timm.create_model("hatnet_tiny", pretrained_cfg=cfg)
    assert (model.num_classes, model.in_chans) == (10, 1)
    assert resolve_model_data_config(model)["input_size"] == (1, 96, 96)


def test_pretrained_weights_load_into_a_features_only_model(released_files):
    overlay = {"file": str(released_files["hatnet_tiny"])}
    model = timm.create_model("hatnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    released = torch.load(released_files["hatnet_tiny"], weights_only=True)
    assert torch.equal(model.stages_2.downsample.conv.weight, released["ds3.conv.weight"])


def test_pretrained_is_downloaded_from_the_address_of_the_moment(
    weights_server, monkeypatch, tmp_path, released_files
):
    monkeypatch.setenv("HATNET_WEIGHTS_URL", weights_server.url)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = timm.create_model("hatnet_tiny.in1k", pretrained=True)
    released = torch.load(released_files["hatnet_tiny"], weights_only=True)
    assert torch.equal(model.head.weight, released["classifier.1.weight"])
    assert "/HAT-Net_Tiny.pth" in weights_server.requests


def test_a_model_saved_for_the_hub_by_timm_comes_back_from_its_folder(tmp_path):
    model = timm.create_model("hatnet_tiny", num_classes=7, in_chans=1).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again(image), model(image))


def test_the_registered_class_is_a_hatnet():
    assert isinstance(timm.create_model("hatnet_tiny"), hatnet_core.HATNet)
