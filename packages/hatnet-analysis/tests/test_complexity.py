import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hatnet_analysis import (
    h_mhsa_macs,
    h_mhsa_macs_completed,
    mhsa_macs,
    reduction_macs,
    stage_complexity,
    window_macs,
)
from hatnet_analysis.complexity import attention_macs, h_mhsa_bound
from hatnet_analysis.flops import trace
from hatnet_analysis.growth import SpatialReductionAttention
from hatnet_core import HierarchicalAttention, create_model
from hatnet_core.attention import Attention, WindowAttention


def traced_macs(module, height, width):
    """Multiply-adds that fvcore traces, without W^p and the normalisations, which the equations leave out."""
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
    ("height", "width", "grid_size", "pool_size", "message"),
    [
        (30, 28, 7, 2, "grid_size must divide height and width, got grid_size=7 and 30×28"),
        (28, 30, 7, 2, "grid_size must divide height and width, got grid_size=7 and 28×30"),
        (28, 28, 7, 8, "pool_size must divide height and width, got pool_size=8 and 28×28"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(height, width, grid_size, pool_size, message):
    with pytest.raises(ValueError, match=message):
        h_mhsa_macs(height, width, 64, grid_size, pool_size)


@pytest.mark.parametrize("name", ["height", "width", "dim", "grid_size", "pool_size"])
@pytest.mark.parametrize("value", [0, -8, 8.0])
def test_an_argument_that_is_not_a_positive_integer_is_refused_by_name(name, value):
    arguments = {"height": 8, "width": 8, "dim": 8, "grid_size": 2, "pool_size": 2, name: value}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value}"):
        h_mhsa_macs(**arguments)
    if name in ("height", "width", "dim"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {value}"):
            mhsa_macs(arguments["height"], arguments["width"], arguments["dim"])


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    grid_size=st.integers(1, 8),
    pool_size=st.integers(1, 8),
)
def test_elsewhere_the_completed_grids_and_pools_are_counted_within_the_bound(size, grid_size, pool_size):
    module = HierarchicalAttention(6, 3, grid_size, pool_size)
    measured = traced_macs(module, *size)
    assert measured == h_mhsa_macs_completed(*size, 6, grid_size, pool_size)
    assert attention_macs(module, *size) == measured
    assert measured <= h_mhsa_bound(*size, 6, grid_size, pool_size)


@settings(max_examples=20, deadline=None)
@given(
    multiples=st.tuples(st.integers(1, 3), st.integers(1, 3)), grid_size=st.integers(1, 6), pool_size=st.integers(1, 6)
)
def test_where_everything_divides_the_completed_count_is_equation_15(multiples, grid_size, pool_size):
    height, width = (m * math.lcm(grid_size, pool_size) for m in multiples)
    arguments = (height, width, 6, grid_size, pool_size)
    assert h_mhsa_macs_completed(*arguments) == h_mhsa_macs(*arguments)


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
        assert row["measured_macs"] == row["h_mhsa_macs"]
        if row["divides"] and row["grid_size"]:
            sizes = row["grid_size"], row["pool_size"]
            assert row["h_mhsa_macs"] == h_mhsa_macs(row["height"], row["width"], row["dim"], *sizes)
        assert row["mhsa_macs"] == mhsa_macs(row["height"], row["width"], row["dim"])


def test_a_stage_of_windows_is_none_that_equation_15_speaks_of():
    with pytest.raises(ValueError, match=r"stage 2 attends in windows, which Eq\. 15 does not speak of"):
        stage_complexity(create_model("hatnet_small_window234"), 224, 224)
