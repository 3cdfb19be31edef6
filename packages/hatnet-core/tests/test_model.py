import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slow_reading
from conftest import SMALL
from hatnet_core import HATNet, create_model, list_models, load_checkpoint
from hatnet_core.attention import Attention, HierarchicalAttention
from hatnet_core.layers import DropPath
from hatnet_testing import raises


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def read_slowly(model):
    """A copy whose attentions are the slow reading of Eq. 6-14 with the same parameters."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, HierarchicalAttention):
            module.forward = lambda x, m=module: slow_reading.hierarchical_attention(m, x)
        elif isinstance(module, Attention):
            module.forward = lambda x, m=module: slow_reading.attention(m, x)
    return model


def test_logits_and_stage_statistics_equal_the_released_computation(parity, tmp_path):
    arguments, weights, cases = parity
    torch.save(weights, tmp_path / "released.pth")
    model = HATNet(**arguments).eval()
    load_checkpoint(model, tmp_path / "released.pth")
    for image, logits, statistics in cases:
        with torch.no_grad():
            assert relative_error(model(image), logits) < 1e-5
            features = model.forward_intermediates(image)
        for stage, expected in statistics.items():
            f = features[stage - 2].transpose(0, 1).flatten(1)
            assert relative_error(torch.stack([f.mean(1), f.std(1)]), expected) < 1e-5


@pytest.mark.parametrize(
    ("size", "grid_sizes", "pool_sizes"),
    [((37, 50), (8, 7, 7), (8, 4, 2)), ((50, 33), (3, 2, 8), (5, 16, 1))],
)
def test_sizes_that_do_not_divide_equal_the_slow_reading_forward_and_gradient(
    small_model, size, grid_sizes, pool_sizes
):
    small_model.double().set_grid(grid_sizes, pool_sizes)
    slow = read_slowly(small_model)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    logits, expected = small_model(image), slow(image)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-10)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(small_model.named_parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    height=st.integers(32, 90),
    width=st.integers(32, 90),
    grid_sizes=st.tuples(*[st.integers(1, 9)] * 3),
    pool_sizes=st.tuples(*[st.integers(1, 17)] * 3),
)
def test_every_size_from_32_up_gives_finite_features_of_the_promised_shapes(
    batch, height, width, grid_sizes, pool_sizes
):
    model = HATNet(**SMALL, grid_sizes=grid_sizes, pool_sizes=pool_sizes, num_classes=5).eval()
    image = torch.randn(batch, 3, height, width)
    with torch.no_grad():
        features = model.forward_intermediates(image)
        logits = model(image)
    for feature, info in zip(features, model.feature_info, strict=True):
        r = info["reduction"]
        assert feature.shape == (batch, info["num_chs"], -(-height // r), -(-width // r))
        assert feature.isfinite().all()
    assert logits.shape == (batch, 5)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("hatnet_tiny", 12.7), ("hatnet_small", 25.7), ("hatnet_medium", 42.9), ("hatnet_large", 63.1)],
)
def test_parameter_counts_are_those_of_table_1(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", list_models())
def test_every_parameter_gets_a_finite_gradient(name):
    model = create_model(name, num_classes=10)
    model(torch.randn(2, 3, 64, 64)).logsumexp(-1).sum().backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        assert p.grad.abs().sum() > 0, parameter_name


def test_bf16_autocast_stays_near_fp32_forward_and_backward(parity):
    arguments, _, cases = parity
    model = HATNet(**arguments).eval()
    image = cases[0][0]
    logits = model(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(image)
    assert low.dtype == torch.bfloat16
    assert relative_error(low.float(), logits) < 0.05
    low.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_set_grid_equals_a_model_built_with_that_grid(small_model):
    image = torch.randn(1, 3, 96, 128)
    before = small_model(image)
    small_model.set_grid(grid_sizes=(8, 8, 8), pool_sizes=(16, 8, 4))
    built = HATNet(**small_model.config).eval()
    built.load_state_dict(small_model.state_dict())
    assert built.config["grid_sizes"] == (8, 8, 8)
    torch.testing.assert_close(small_model(image), built(image))
    assert not torch.allclose(small_model(image), before)


def test_set_grid_keeps_what_is_not_given(small_model):
    small_model.set_grid(grid_sizes=(4, 4, 4))
    assert small_model.config["pool_sizes"] == (8, 4, 2)
    assert small_model.stages[1].blocks[1].attn.grid_size == 4
    assert small_model.stages[1].blocks[1].attn.pool_size == 4


@pytest.mark.parametrize("grid_sizes", [(8, 8), (8, 8, 0), (8, 8, 8, 8), (8.0, 8, 8)])
def test_set_grid_refuses_bad_sizes_and_changes_nothing(small_model, grid_sizes):
    with raises(ValueError, "grid_sizes"):
        small_model.set_grid(grid_sizes, (1, 1, 1))
    assert small_model.config["pool_sizes"] == (8, 4, 2)
    assert small_model.stages[0].blocks[0].attn.pool_size == 8


def test_forward_is_features_then_head(small_model):
    image = torch.randn(2, 3, 64, 64)
    features = small_model.forward_features(image)
    assert features.shape == (2, 24, 2, 2)
    pooled = small_model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    expected = pooled @ small_model.head.weight.T + small_model.head.bias
    torch.testing.assert_close(small_model(image), expected)


def test_intermediates_are_the_stage_outputs_in_their_order_each_once(small_model):
    image = torch.randn(1, 3, 64, 64)
    all_four = small_model.forward_intermediates(image)
    torch.testing.assert_close(all_four[3], small_model.forward_features(image))
    first, second = small_model.forward_intermediates(image, indices=(1, 0, -3))
    torch.testing.assert_close(first, all_four[0])
    torch.testing.assert_close(second, all_four[1])
    torch.testing.assert_close(small_model.forward_intermediates(image, 2), all_four[2:])
    torch.testing.assert_close(small_model.forward_intermediates(image, np.array([-1, -4])), all_four[::3])
    final, maps = small_model.forward_intermediates(image, (0,), intermediates_only=False)
    torch.testing.assert_close([final, *maps], [all_four[3], all_four[0]])
    early, maps = small_model.forward_intermediates(image, (0,), stop_early=True, intermediates_only=False)
    torch.testing.assert_close([early, *maps], [all_four[0]] * 2)


def test_intermediates_refuse_another_format(small_model):
    with raises(ValueError, "output_fmt", "NCHW", "NLC"):
        small_model.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NLC")


def test_stages_behind_the_last_map_asked_for_are_not_computed(small_model):
    small_model.stages[2].forward = None
    assert len(small_model.forward_intermediates(torch.randn(1, 3, 64, 64), (0, 1))) == 2


def test_pruning_keeps_the_maps_and_drops_what_they_do_not_need(small_model):
    image = torch.randn(1, 3, 64, 64)
    expected = small_model.forward_intermediates(image, (0, 2))
    assert small_model.prune_intermediate_layers((0, -2)) == [0, 2]
    torch.testing.assert_close(small_model.forward_intermediates(image, (0, 2)), expected)
    assert len(small_model.stages) == 3
    assert small_model.num_features == 16
    torch.testing.assert_close(small_model(image), expected[1])
    with raises(ValueError, "indices", 2, (3,)):
        small_model.forward_intermediates(image, (3,))


@pytest.mark.parametrize("indices", [(), (4,), (-5,), (0, 7), 0, 5, "1", 1.0, True, (1.0, 2), (True,)])
def test_intermediates_refuse_a_stage_that_is_not_there(small_model, indices):
    with raises(ValueError, "indices", repr(indices)):
        small_model.forward_intermediates(torch.randn(1, 3, 64, 64), indices)


def test_the_classifier_can_be_replaced_and_removed(small_model):
    image = torch.randn(2, 3, 64, 64)
    small_model.reset_classifier(7)
    assert small_model(image).shape == (2, 7)
    assert small_model.get_classifier().out_features == 7
    assert HATNet(**small_model.config)(image).shape == (2, 7)
    with raises(ValueError, "num_classes", 3.5):
        small_model.reset_classifier(3.5)
    assert small_model.num_classes == 7
    small_model.reset_classifier(0)
    assert small_model(image).shape == (2, 24)


def test_global_pool_can_be_left_out_at_building_and_later(small_model):
    image = torch.randn(1, 3, 64, 96)
    features = small_model.forward_features(image)
    unpooled = HATNet(**{**small_model.config, "num_classes": 0, "global_pool": ""}).eval()
    assert unpooled(image).shape == features.shape
    small_model.reset_classifier(0, "")
    assert torch.equal(small_model(image), features)
    assert HATNet(**small_model.config).global_pool == ""
    small_model.reset_classifier(3, "avg")
    assert small_model(image).shape == (1, 3)


@pytest.mark.parametrize(("num_classes", "global_pool"), [(5, ""), (0, "max")])
def test_a_global_pool_that_does_not_go_with_the_head_is_refused(num_classes, global_pool, small_model):
    got = num_classes or global_pool
    with raises(ValueError, "global_pool", got):
        small_model.reset_classifier(num_classes, global_pool)
    with raises(ValueError, "global_pool", got):
        HATNet(**SMALL, num_classes=num_classes, global_pool=global_pool)
    assert small_model.num_classes == 5


def test_a_new_classifier_is_in_the_mode_and_dtype_of_the_model(small_model):
    small_model.double().train().reset_classifier(3)
    assert small_model.head.training
    assert small_model.head.weight.dtype == torch.float64


@pytest.mark.parametrize(("img_size", "grid_sizes"), [(384, None), ((100, 77), (8, 8, 8))])
def test_set_input_size_sets_the_grids_and_changes_nothing_else(img_size, grid_sizes, small_model):
    before = {name: p.clone() for name, p in small_model.state_dict().items()}
    small_model.set_input_size(img_size, grid_sizes=grid_sizes)
    assert small_model.config["grid_sizes"] == (grid_sizes or (8, 7, 7))
    assert all(torch.equal(p, before[name]) for name, p in small_model.state_dict().items())


@pytest.mark.parametrize(
    ("img_size", "named"), [(31, (32, 31)), ((64, 16), (32, 16)), ((64,), (2, (64,))), ((64, 2.5), (1, 2.5))]
)
def test_set_input_size_refuses_what_cannot_run(img_size, named, small_model):
    with raises(ValueError, "img_size", *named):
        small_model.set_input_size(img_size)


def saved_bytes(model, image):
    """Bytes of the activations that one forward pass keeps for its backward pass."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(image)
    del out
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_gradient_checkpointing_keeps_less_than_half_of_the_activations():
    model = create_model("hatnet_tiny", num_classes=2)
    image = torch.randn(1, 3, 64, 64)
    plain = saved_bytes(model, image)
    model.set_grad_checkpointing(True)
    assert saved_bytes(model, image) < plain / 2
    model.set_grad_checkpointing(False)
    assert saved_bytes(model, image) == pytest.approx(plain, rel=0.1)


def test_gradient_checkpointing_keeps_output_and_gradients_with_dropout_and_stochastic_depth():
    model = HATNet(**SMALL, num_classes=5, drop_rate=0.3, proj_drop_rate=0.3, drop_path_rate=0.5).train()
    image = torch.randn(4, 3, 48, 48)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(1)
        out = model(image)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("attention", ["hierarchical", "window"])
@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_falls_in_a_group_of_the_matcher(coarse, attention):
    matcher = HATNet(**SMALL, attention=(attention,) * 3).group_matcher(coarse)
    patterns = [matcher["stem"], matcher["head"], *(pattern for pattern, _ in matcher["blocks"])]
    names = [name for name, _ in HATNet(**SMALL, attention=(attention,) * 3).named_parameters()]
    assert [name for name in names if sum(bool(re.match(p, name)) for p in patterns) != 1] == []


def test_only_the_bias_tables_of_windows_are_beyond_norms_and_biases_without_weight_decay():
    assert HATNet(**SMALL).no_weight_decay() == set()
    names = HATNet(**SMALL, attention=("window", "hierarchical", "hierarchical")).no_weight_decay()
    assert names == {"stages.0.blocks.0.attn.relative_position_bias_table"}


def test_stochastic_depth_rises_linearly_from_the_first_block_to_the_last():
    model = create_model("hatnet_tiny", drop_path_rate=0.24)
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.02 * i for i in range(13) for _ in ("attention", "mlp")])


def test_weights_are_drawn_from_a_truncated_normal_of_std_002():
    model = create_model("hatnet_tiny")
    assert model.stages[2].downsample.conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name


def test_any_number_of_input_channels_and_classes():
    model = HATNet(**SMALL, in_chans=5, num_classes=3)
    assert model(torch.randn(2, 5, 32, 40)).shape == (2, 3)


@pytest.mark.parametrize(
    ("image", "named"),
    [
        (torch.zeros(3, 64, 64), ("B×3×H×W", (3, 64, 64))),
        (torch.zeros(1, 1, 64, 64), ("B×3×H×W", (1, 1, 64, 64))),
        (torch.zeros(1, 3, 31, 64), (32, 31, 64)),
        (torch.zeros(1, 3, 64, 16), (32, 64, 16)),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), (torch.uint8,)),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), (torch.int64,)),
        (torch.zeros(1, 3, 64, 64, dtype=torch.bool), (torch.bool,)),
        (np.zeros((1, 3, 64, 64), dtype=np.float32), ("ndarray",)),
    ],
    ids=str,
)
def test_what_is_not_a_batch_of_images_is_refused(image, named, small_model):
    for function in (small_model, small_model.forward_features, small_model.forward_intermediates):
        with raises(ValueError, "input", *named):
            function(image)


def test_numbers_of_numpy_are_taken_as_python_ones():
    arguments = {name: [np.int64(v) for v in values] for name, values in SMALL.items() if name != "head_dim"}
    model = HATNet(**arguments, head_dim=np.int32(8), num_classes=np.int64(5), drop_rate=np.float32(0.25))
    assert type(model.num_features) is type(model.feature_info[0]["num_chs"]) is type(model.head.out_features) is int
    assert model.config == HATNet(**SMALL, num_classes=5, drop_rate=0.25).config


@pytest.mark.parametrize("arguments", [{"grid_sizes": (8, 0, 7)}, {"pool_sizes": (8, 4, -2)}, {"grid_sizes": (8, 7)}])
def test_grids_and_pools_that_are_not_positive_are_refused_and_nothing_changes(arguments, small_model):
    before = dict(small_model.config)
    with raises(ValueError, *arguments):
        small_model.set_grid(**arguments)
    assert small_model.config == before


def test_importing_hatnet_core_imports_torch_and_nothing_else_outside_the_standard_library():
    program = "import sys, torch; before = set(sys.modules); import hatnet_core; print(*set(sys.modules) - before)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in result.stdout.split()}
    assert packages - sys.stdlib_module_names == {"hatnet_core"}


@pytest.mark.parametrize(
    ("argument", "value", "named"),
    [
        ("attention", ("window", "plain", "window"), ("attention", "'hierarchical'", "'window'", "'plain'")),
        ("attention", "window", ("attention", 3, "'window'")),
        ("depthwise", "false", ("depthwise", "'false'")),
        ("activation", "relu", ("activation", "'silu'", "'gelu'", "'relu'")),
        ("embed_dims", (8, 16, 17, 24), ("head_dim", 8, 17)),
        ("embed_dims", (8, 16, 24), ("embed_dims", 4, (8, 16, 24))),
        ("embed_dims", 5, ("embed_dims", 4, 5)),
        ("depths", (1, 1, 0, 1), ("depths", 1, 0)),
        ("num_classes", -1, ("num_classes", -1)),
        ("num_classes", 2.5, ("num_classes", 2.5)),
        ("num_classes", "10", ("num_classes", "'10'")),
        ("drop_rate", 2, ("drop_rate", 2)),
        ("proj_drop_rate", -0.1, ("proj_drop_rate", -0.1)),
        ("drop_path_rate", 1.5, ("drop_path_rate", 1.5)),
        ("in_chans", 0, ("in_chans", 1, 0)),
    ],
)
def test_bad_arguments_are_refused_by_name_and_value(argument, value, named):
    with raises(ValueError, *named):
        HATNet(**{**SMALL, argument: value})
