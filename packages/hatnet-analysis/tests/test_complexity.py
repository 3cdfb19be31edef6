import inspect
import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hatnet_analysis import (
    h_mhsa_macs,
    h_mhsa_macs_padded,
    mhsa_macs,
    reduction_macs,
    stage_complexity,
    window_macs,
)
from hatnet_analysis.complexity import (
    attention_macs,
    h_mhsa_bound,
    h_mhsa_cost,
    mhsa_cost,
    reduction_cost,
    window_cost,
)
from hatnet_analysis.flops import trace
from hatnet_analysis.growth import SpatialReductionAttention
from hatnet_analysis.memory import peak_memory
from hatnet_core import HATNet, HierarchicalAttention, create_model
from hatnet_core.attention import Attention, WindowAttention
from hatnet_testing import raises

SMALL = {"embed_dims": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "head_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


def traced_macs(module, height, width):
    """Multiply-adds that fvcore traces, without W^p and the normalisations, which the equations omit."""
    analysis = trace(module, torch.zeros(1, module.proj.in_channels, height, width))
    return analysis.total() - analysis.total("proj") - analysis.by_operator()["group_norm"]


def dispatched_macs(module, height, width):
    """Likewise from the operators that torch dispatches, with the attention taken apart into its products."""
    module = module.to("meta")
    image = torch.zeros(1, module.proj.in_channels, height, width, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(image)
    proj = sum(counter.get_flop_counts()[f"{type(module).__name__}.proj"].values())
    return (counter.get_total_flops() - proj) / 2


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 9),
)
def test_equation_5_is_what_the_plain_attention_computes(height, width, heads, head_dim):
    module = Attention(heads * head_dim, head_dim)
    expected = mhsa_macs(height, width, heads * head_dim)
    assert traced_macs(module, height, width) == expected
    assert dispatched_macs(module, height, width) == expected


@settings(max_examples=20, deadline=None)
@given(
    multiples=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 9),
    grid_size=st.integers(1, 8),
    pool_size=st.integers(1, 8),
)
def test_equation_15_is_what_hierarchical_attention_computes_wherever_the_sizes_divide(
    multiples, heads, head_dim, grid_size, pool_size
):
    height, width = (m * math.lcm(grid_size, pool_size) for m in multiples)
    module = HierarchicalAttention(heads * head_dim, head_dim, grid_size, pool_size)
    expected = h_mhsa_macs(height, width, heads * head_dim, grid_size, pool_size)
    assert traced_macs(module, height, width) == expected
    assert dispatched_macs(module, height, width) == expected


def test_the_equations_give_the_numbers_worked_out_by_hand_for_the_first_stage_of_tiny():
    # 56×56 positions, C = 48: 3·3136·48² + 2·3136²·48, and 3136·48·(4·48 + 2·8²) + 2·7²·48·(48 + 3136)
    assert mhsa_macs(56, 56, 48) == 965_787_648
    assert h_mhsa_macs(56, 56, 48, grid_size=8, pool_size=8) == 63_146_496


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (h_mhsa_macs, (30, 28, 64, 7, 2), ("grid_size", 7, "30×28")),
        (h_mhsa_macs, (28, 30, 64, 7, 2), ("grid_size", 7, "28×30")),
        (h_mhsa_macs, (28, 28, 64, 7, 8), ("pool_size", 8, "28×28")),
        (window_cost, (30, 28, 1, 7), ("window_size", 7, "30×28")),
        (reduction_cost, (28, 28, 1, 8), ("reduction", 8, "28×28")),
    ],
)
def test_sizes_that_do_not_divide_are_refused(function, arguments, named):
    with raises(ValueError, *named):
        function(*arguments)


@pytest.mark.parametrize("name", ["height", "width", "dim", "grid_size", "pool_size"])
@pytest.mark.parametrize("value", [0, -8, 8.0])
def test_an_argument_that_is_not_a_positive_integer_is_refused_by_name(name, value):
    arguments = {"height": 8, "width": 8, "dim": 8, "grid_size": 2, "pool_size": 2, name: value}
    with raises(ValueError, name, value):
        h_mhsa_macs(**arguments)
    if name in ("height", "width", "dim"):
        with raises(ValueError, name, value):
            mhsa_macs(arguments["height"], arguments["width"], arguments["dim"])


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    grid_size=st.integers(1, 8),
    pool_size=st.integers(1, 8),
)
def test_elsewhere_the_padded_grids_and_pools_are_counted_within_the_bound(size, grid_size, pool_size):
    module = HierarchicalAttention(6, 3, grid_size, pool_size)
    measured = traced_macs(module, *size)
    assert measured == h_mhsa_macs_padded(*size, 6, grid_size, pool_size)
    assert attention_macs(module, *size) == measured
    assert measured <= h_mhsa_bound(*size, 6, grid_size, pool_size)


@settings(max_examples=20, deadline=None)
@given(
    multiples=st.tuples(st.integers(1, 3), st.integers(1, 3)), grid_size=st.integers(1, 6), pool_size=st.integers(1, 6)
)
def test_where_everything_divides_the_padded_count_is_equation_15(multiples, grid_size, pool_size):
    height, width = (m * math.lcm(grid_size, pool_size) for m in multiples)
    arguments = (height, width, 6, grid_size, pool_size)
    assert h_mhsa_macs_padded(*arguments) == h_mhsa_macs(*arguments)


@settings(max_examples=20, deadline=None)
@given(multiples=st.tuples(st.integers(1, 3), st.integers(1, 3)), size=st.integers(1, 8))
def test_windows_and_spatial_reduction_compute_what_their_forms_say(multiples, size):
    height, width = (m * size for m in multiples)
    window = WindowAttention(6, 6, size)
    assert traced_macs(window, height, width) == window_macs(height, width, 6, size)
    reduction = SpatialReductionAttention(6, size)
    assert traced_macs(reduction, height, width) == reduction_macs(height, width, 6, size)


@pytest.mark.parametrize("name", ["hatnet_tiny", "hatnet_large"])
@pytest.mark.parametrize("size", [(224, 224), (448, 224), (320, 256)])
def test_every_stage_of_a_model_is_measured_equal_to_its_formula(name, size):
    rows = stage_complexity(create_model(name), *size)
    assert [row["stage"] for row in rows] == [2, 3, 4, 5]
    for row in rows:
        assert row["measured_macs"] == row["h_mhsa_macs_padded"] <= row["h_mhsa_bound"]
        assert row["mhsa_macs"] == mhsa_macs(row["height"], row["width"], row["dim"])
        if row["grid_size"] is None:
            assert row["measured_macs"] == row["mhsa_macs"]
        elif row["divides"]:
            sizes = row["grid_size"], row["pool_size"]
            expected = h_mhsa_macs(row["height"], row["width"], row["dim"], *sizes)
            assert row["measured_macs"] == row["h_mhsa_macs"] == expected


def test_where_sizes_do_not_divide_equation_15_stands_beside_the_padded_count_and_the_bound():
    # 480×320 pixels: maps of 120×80, 60×40 and 30×20 with G1 = 8, 7, 7 and G2 = 8, 4, 2; the first one divides
    rows = stage_complexity(create_model("hatnet_tiny"), 480, 320)
    assert [row["divides"] for row in rows] == [True, False, False, True]
    for row in rows[1:3]:
        assert row["measured_macs"] == row["h_mhsa_macs_padded"] < row["h_mhsa_bound"]
        assert row["measured_macs"] != row["h_mhsa_macs"]
    # stage 3, C = 96: 2400·96·(4·96 + 2·7²) + 2·(2400/4²)·96·(96 + 2400), and 63·42 positions in its grids
    assert rows[1]["h_mhsa_macs"] == 182_937_600
    assert rows[1]["h_mhsa_macs_padded"] == 182_937_600 + 2 * (63 * 42 - 2400) * 49 * 96
    assert rows[1]["h_mhsa_bound"] == pytest.approx(182_937_600 * (66 / 60) * (46 / 40))
    dense = stage_complexity(create_model("hatnet_tiny"), 36, 36)[0]  # 9×9 positions: 81/8² pools
    assert dense["h_mhsa_macs"] == pytest.approx(81 * 48 * (4 * 48 + 128) + 2 * 81 / 64 * 48 * (48 + 81))


def attended_weights(module, height, width):
    """Of each attention that the module runs, how many weights its queries and keys make."""
    attention, seen = F.scaled_dot_product_attention, []

    def record(q, k, v, **kwargs):
        seen.append(q.shape[:-1].numel() * k.shape[-2])
        return attention(q, k, v, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", record):
        module(torch.zeros(1, module.proj.in_channels, height, width))
    return seen


@settings(max_examples=20, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    heads=st.integers(1, 3),
    grid_size=st.integers(1, 8),
    pool_size=st.integers(1, 8),
)
def test_weights_are_as_many_as_queries_and_keys_make_at_any_size(size, heads, grid_size, pool_size):
    module = HierarchicalAttention(heads * 2, 2, grid_size, pool_size)
    assert max(attended_weights(module, *size)) == h_mhsa_cost(*size, 2, grid_size, pool_size, heads).weights
    assert attended_weights(Attention(heads * 2, 2), *size) == [mhsa_cost(*size, 2, heads).weights]


@settings(max_examples=10, deadline=None)
@given(multiples=st.tuples(st.integers(1, 3), st.integers(1, 3)), heads=st.integers(1, 3), size=st.integers(1, 6))
def test_weights_of_windows_and_spatial_reduction_are_as_many_as_queries_and_keys_make(multiples, heads, size):
    height, width = (m * size for m in multiples)
    windows = attended_weights(WindowAttention(heads * 2, 2, size), height, width)
    assert windows == [window_cost(height, width, 2, size, heads).weights]
    reduced = attended_weights(SpatialReductionAttention(2, size), height, width)
    assert reduced == [reduction_cost(height, width, 2, size).weights]


@pytest.mark.parametrize("function", [mhsa_cost, h_mhsa_cost, window_cost, reduction_cost])
@pytest.mark.parametrize("value", [0, -8, 8.0])
def test_costs_refuse_what_is_not_a_positive_integer_by_name(function, value):
    names = list(inspect.signature(function).parameters)
    for name in names:
        with raises(ValueError, name, value):
            function(**dict.fromkeys(names, 8) | {name: value})


def measured_bytes(module, height, width):
    """Of a map as the model lays it out."""
    x = torch.randn(1, module.proj.in_channels, height, width).contiguous(memory_format=torch.channels_last)
    module.eval()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        return peak_memory(lambda: module(x), x.device)


TOLERANCE = 0.03
"""For what is smaller than a map by an order; a copy of a map is more, the weights alone are 9 bytes each."""


def test_the_model_gives_its_attention_maps_whose_channels_are_last():
    model, layouts = HATNet(**SMALL).eval(), []
    for stage in model.stages:
        stage.blocks[-1].attn.register_forward_pre_hook(
            lambda _, inputs: layouts.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
        )
    with torch.inference_mode():
        model(torch.randn(1, 3, 96, 96))
    assert layouts == [True] * 4


@pytest.mark.parametrize("dim_heads", [(64, 1), (48, 3)])
@pytest.mark.parametrize("size", [(56, 56), (50, 37), (28, 100), (5, 40)])
@pytest.mark.parametrize("sizes", [(8, 8), (7, 4), (12, 2)])
def test_bytes_of_mhsa_and_h_mhsa_are_what_is_held_at_the_peak_at_any_size(dim_heads, size, sizes):
    dim, heads = dim_heads
    module = HierarchicalAttention(dim, dim // heads, *sizes)
    assert measured_bytes(module, *size) == pytest.approx(h_mhsa_cost(*size, dim, *sizes, heads).memory, rel=TOLERANCE)
    module = Attention(dim, dim // heads)
    assert measured_bytes(module, *size) == pytest.approx(mhsa_cost(*size, dim, heads).memory, rel=TOLERANCE)


@pytest.mark.parametrize("size", [(56, 56), (40, 96)])
def test_bytes_of_windows_and_spatial_reduction_are_what_is_held_at_the_peak(size):
    for heads in (1, 3):
        window = WindowAttention(48, 48 // heads, 8)
        assert measured_bytes(window, *size) == pytest.approx(window_cost(*size, 48, 8, heads).memory, rel=TOLERANCE)
    reduction = SpatialReductionAttention(48, 8)
    assert measured_bytes(reduction, *size) == pytest.approx(reduction_cost(*size, 48, 8).memory, rel=TOLERANCE)


def test_a_stage_of_windows_is_none_that_equation_15_speaks_of():
    with raises(ValueError, "stage 2", "windows", "Eq. 15"):
        stage_complexity(create_model("hatnet_small_window234"), 224, 224)
