import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformerBlock

import slow_reading
from hatnet_core import HierarchicalAttention
from hatnet_core.attention import (
    Attention,
    WindowAttention,
    average_pool,
    crop,
    grid_attention,
    grid_partition,
    grid_reverse,
    pad_to_multiple,
)
from hatnet_testing import raises


def randomise(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.double()


def values_and_gradients(function, module, x):
    """Output, gradient of the input and of every parameter, for a fixed weighting of the outputs."""
    x = x.clone().requires_grad_()
    out = function(x)
    weighting = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    gradients = torch.autograd.grad((out * weighting).sum(), [x, *module.parameters()])
    return [out.detach(), *gradients]


def assert_agree(module, reading, x):
    ours = values_and_gradients(module, module, x)
    theirs = values_and_gradients(lambda x: reading(module, x), module, x)
    names = ["output", "input gradient", *(f"gradient of {name}" for name, _ in module.named_parameters())]
    for name, actual, expected in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 11),
    width=st.integers(1, 11),
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 4),
    grid_size=st.integers(1, 8),
    pool_size=st.integers(1, 8),
    seed=st.integers(0, 2**31),
)
def test_hierarchical_attention_agrees_with_the_slow_reading_forward_and_gradient(
    batch, height, width, heads, head_dim, grid_size, pool_size, seed
):
    torch.manual_seed(seed)
    module = randomise(HierarchicalAttention(heads * head_dim, head_dim, grid_size, pool_size))
    x = torch.randn(batch, heads * head_dim, height, width, dtype=torch.float64)
    assert_agree(module, slow_reading.hierarchical_attention, x)


def test_hierarchical_attention_of_the_paper_agrees_with_the_slow_reading_where_sizes_divide():
    module = randomise(HierarchicalAttention(96, 48, grid_size=7, pool_size=2))
    assert_agree(module, slow_reading.hierarchical_attention, torch.randn(1, 96, 14, 14, dtype=torch.float64))


def test_plain_attention_agrees_with_the_slow_reading():
    module = randomise(Attention(12, head_dim=4))
    assert_agree(module, slow_reading.attention, torch.randn(2, 12, 5, 3, dtype=torch.float64))


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    heads=st.integers(1, 2),
    window_size=st.integers(1, 4),
    shifted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_window_attention_agrees_with_the_slow_reading_forward_and_gradient(
    height, width, heads, window_size, shifted, seed
):
    torch.manual_seed(seed)
    module = randomise(WindowAttention(2 * heads, 2, window_size, shifted))
    x = torch.randn(2, 2 * heads, height, width, dtype=torch.float64)
    assert_agree(module, slow_reading.window_attention, x)


@pytest.mark.parametrize("shifted", [False, True])
def test_window_attention_is_swins(shifted):
    theirs = SwinTransformerBlock(24, (14, 21), num_heads=3, window_size=7, shift_size=3 if shifted else 0).double()
    ours = WindowAttention(24, head_dim=8, window_size=7, shifted=shifted).double()
    ours.norm = torch.nn.Identity()  # Swin's is of another kind
    with torch.no_grad():
        theirs.attn.relative_position_bias_table.normal_()
        for layer, linear in ((ours.qkv, theirs.attn.qkv), (ours.proj, theirs.attn.proj)):
            layer.weight.copy_(linear.weight[:, :, None, None])
            layer.bias.copy_(linear.bias)
        ours.relative_position_bias_table.copy_(theirs.attn.relative_position_bias_table)
        x = torch.randn(2, 24, 14, 21, dtype=torch.float64)
        expected = theirs._attn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours(x), expected, rtol=1e-10, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    heads=st.integers(1, 3),
    grid_size=st.integers(1, 5),
    pool_size=st.integers(1, 4),
)
def test_attention_weights_times_values_are_the_attention_and_give_nothing_to_padding(
    batch, size, heads, grid_size, pool_size
):
    layer = randomise(HierarchicalAttention(3 * heads, 3, grid_size, pool_size))
    x = torch.randn(batch, 3 * heads, *size, dtype=torch.float64)
    local, global_ = layer.attention_weights(x)
    values = layer.qkv(layer.norm(x)).reshape(batch, 3, heads, 3, *size)[:, 2]
    expected = torch.zeros_like(values)
    grid_h, grid_w = (min(side, grid_size) for side in size)
    for row, column in np.ndindex(*local.shape[2:4]):
        top, left = row * grid_h, column * grid_w
        grid = values[..., top : top + grid_h, left : left + grid_w]
        rows, columns = grid.shape[-2:]
        weights = local[:, :, row, column].unflatten(-1, (grid_h, grid_w)).unflatten(-3, (grid_h, grid_w))
        assert not weights[..., rows:, :].any()
        assert not weights[..., columns:].any()
        result = torch.einsum("bhyxuv,bhduv->bhdyx", weights[:, :, :rows, :columns, :rows, :columns], grid)
        expected[..., top : top + rows, left : left + columns] = result
    a1 = layer.grid_norm(x + expected.flatten(1, 2))
    values = layer.kv(layer.pool_norm(slow_reading.pool(a1, pool_size))).reshape(batch, 2, heads, 3, -1)[:, 1]
    a2 = torch.einsum("bhnm,bhdm->bhdn", global_, values).reshape(a1.shape)
    torch.testing.assert_close(layer(x), layer.proj(a1 + a2))
    for weights in (local, global_):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_weights_of_plain_attention_times_values_are_the_attention():
    layer, x = randomise(Attention(12, head_dim=4)), torch.randn(2, 12, 5, 3, dtype=torch.float64)
    values = layer.qkv(layer.norm(x)).reshape(2, 3, 3, 4, 15)[:, 2]
    out = torch.einsum("bhnm,bhdm->bhdn", layer.attention_weights(x), values)
    torch.testing.assert_close(layer(x), layer.proj(out.reshape(x.shape)))


def test_padding_is_cropped_and_grids_are_put_back_where_they_were():
    x = torch.randn(2, 6, 5, 7)
    padded = pad_to_multiple(x, (2, 3))
    assert padded.shape == (2, 6, 6, 9)
    assert torch.equal(crop(padded, 5, 7), x)
    assert padded.sum() == x.sum()
    grids = grid_partition(padded, (2, 3))  # [B·3·3, 6 positions, C]
    assert torch.equal(grids[4], padded[0, :, 2:4, 3:6].flatten(1).t())
    heads = grids.unflatten(2, (2, 3)).transpose(1, 2)
    assert torch.equal(grid_reverse(heads, 2, 5, 7, (2, 3)), padded)


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 3), (17, 5)])
@pytest.mark.parametrize("pool_size", [1, 2, 3, 8])
def test_pooling_while_compiling_equals_eager_pooling(size, pool_size):
    torch.compiler.reset()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    compiled = torch.compile(average_pool, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, pool_size), slow_reading.pool(x, pool_size))
    torch.testing.assert_close(average_pool(x, pool_size), slow_reading.pool(x, pool_size))


def test_positions_of_other_grids_do_not_change_the_local_attention():
    qkv = torch.randn(1, 24, 10, 10)
    before = grid_attention(qkv, num_heads=2, grid_size=4)
    qkv[..., 4:8, :4] += 1.0
    changed = (grid_attention(qkv, num_heads=2, grid_size=4) != before).any(1)[0]
    assert changed[4:8, :4].all()
    changed[4:8, :4] = False
    assert not changed.any()


def test_grid_and_pool_size_can_be_set_on_a_built_module():
    module = randomise(HierarchicalAttention(8, 4, grid_size=8, pool_size=8))
    other = HierarchicalAttention(8, 4, grid_size=3, pool_size=2).double()
    other.load_state_dict(module.state_dict())
    module.grid_size, module.pool_size = 3, 2
    x = torch.randn(1, 8, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(module(x), other(x))


@pytest.mark.parametrize("kind", [HierarchicalAttention, Attention, WindowAttention])
def test_a_head_dim_that_does_not_divide_the_channels_is_refused(kind):
    with raises(ValueError, "head_dim", 64, 100):
        kind(100, head_dim=64)


@pytest.mark.parametrize("name", ["dim", "head_dim", "grid_size", "pool_size"])
@pytest.mark.parametrize("value", [0, -4, 2.0, True])
def test_a_size_that_is_not_a_positive_integer_is_refused_by_name(name, value):
    arguments = {"dim": 8, "head_dim": 4, "grid_size": 2, "pool_size": 2, name: value}
    with raises(ValueError, name, value):
        HierarchicalAttention(**arguments)


def test_channel_dropout_zeroes_whole_channels_in_training_only():
    module = randomise(HierarchicalAttention(64, 32, 4, 2, proj_drop_rate=0.5)).train()
    x = torch.randn(1, 64, 6, 6, dtype=torch.float64)
    dropped = (module(x) == 0).flatten(2).float().mean(-1)[0]
    assert set(dropped.tolist()) == {0.0, 1.0}
    assert not (module.eval()(x) == 0).any()
