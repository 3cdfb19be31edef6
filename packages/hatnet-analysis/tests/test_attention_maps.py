"""Attention maps: against the model's own attention, and on weights that must point somewhere."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hatnet_analysis.attention_input import describe_weights, to_input
from hatnet_analysis.attention_maps import (
    AttentionWeights,
    attention_weights,
    check_size,
    look,
    point_attention,
    record_weights,
    rollout,
    to_position,
)
from hatnet_analysis.figures import attention_figure, save_figure
from hatnet_core import HATNet, HierarchicalAttention
from hatnet_core.attention import (
    Attention,
    WindowAttention,
    average_pool,
    global_attention,
    grid_attention,
    self_attention,
)
from hatnet_testing import check, raises

SMALL = {"embed_dims": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "head_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


def to_grids(x, grid):
    """[H, W] → [rows, columns, g·g'], zero-padded."""
    rows, columns = -(-x.shape[0] // grid[0]), -(-x.shape[1] // grid[1])
    padded = x.new_zeros(rows * grid[0], columns * grid[1])
    padded[: x.shape[0], : x.shape[1]] = x
    blocks = [part.flatten() for row in padded.split(grid[0], 0) for part in row.split(grid[1], 1)]
    return torch.stack(blocks).reshape(rows, columns, -1)


def from_grids(x, grid, size):
    """[rows, columns, g·g'] → [H, W], without the padding."""
    return torch.cat([torch.cat([cell.reshape(grid) for cell in row], 1) for row in x])[: size[0], : size[1]]


def heads_of(x, parts, heads):
    """[1, parts·heads·d, H, W] → values [heads, H·W, d], the last of the parts."""
    return x.reshape(parts, heads, -1, x.shape[-2] * x.shape[-1])[-1].transpose(-2, -1)


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    grid_size=st.integers(1, 8),
    pool_size=st.integers(1, 8),
    heads=st.integers(1, 3),
)
def test_the_weights_times_the_values_are_what_the_layer_computes(size, grid_size, pool_size, heads):
    torch.manual_seed(0)
    layer = HierarchicalAttention(4 * heads, 4, grid_size, pool_size).double()
    x = torch.randn(1, 4 * heads, *size, dtype=torch.double)
    with torch.no_grad():
        weights = attention_weights(layer, x)
        qkv = layer.qkv(layer.norm(x))
        planes = qkv[0].reshape(3, heads, 4, *size)[2].flatten(0, 1)
        values = torch.stack([to_grids(plane, weights.grid) for plane in planes]).unflatten(0, (heads, 4))
        local = torch.einsum("hrcnm,hdrcm->hdrcn", weights.local, values)
        mixed = torch.stack([from_grids(plane, weights.grid, size) for plane in local.flatten(0, 1)])
        expected = grid_attention(qkv, heads, grid_size)
        torch.testing.assert_close(mixed[None], expected)
        a1 = layer.grid_norm(x + expected)
        kv = layer.kv(layer.pool_norm(average_pool(a1, pool_size)))
        out = weights.global_ @ heads_of(kv, 2, heads)
        torch.testing.assert_close(
            out.transpose(-2, -1).reshape(1, 4 * heads, *size), global_attention(layer.q(a1), kv, heads)
        )
    for rows in (weights.local, weights.global_):
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows.sum(-1)))


def test_plain_attention_has_global_weights_alone():
    torch.manual_seed(0)
    layer, x = Attention(16, 8), torch.randn(1, 16, 3, 5)
    with torch.no_grad():
        weights = attention_weights(layer, x)
        qkv = layer.qkv(layer.norm(x))
        out = (weights.global_ @ heads_of(qkv, 3, 2)).transpose(-2, -1).reshape(1, 16, 3, 5)
        torch.testing.assert_close(out, self_attention(qkv, 2))
    assert weights.local is None
    assert weights.pool_size == 1


def test_an_attention_in_windows_is_refused():
    with raises(ValueError, "MHSA", "WindowAttention"):
        attention_weights(WindowAttention(8, 8), torch.zeros(1, 8, 7, 7))


def idle(height, width, stride, input_size):
    """Attention of each position to itself alone, so that rollout is what the residuals pass on."""
    positions = height * width
    return AttentionWeights(height, width, None, 1, None, torch.eye(positions)[None], stride, input_size)


@pytest.mark.parametrize("side", [224, 225, 230, 250, 260, 300])
def test_a_point_is_lit_by_its_own_rollout_in_every_stage(side):
    maps = [-(-side // stride) for stride in (4, 8, 16, 32)]
    recorded = [[idle(size, size, 4 * 2**i, (side, side))] for i, size in enumerate(maps)]
    image = Image.new("RGB", (300, 200))
    lit = {}
    for x in [*range(0, 300, 7), 299, math.nextafter(300, 0)]:
        y = math.nextafter(200, 0) * (1 - x / 300)  # from the lower left to the upper right
        places = [to_position((x, y), image, blocks[0]) for blocks in recorded]
        for i, (row, column) in enumerate(places):
            stride = 4 * 2**i
            assert row * stride <= y * side / 200 <= (row + 1) * stride
            assert column * stride <= x * side / 300 <= (column + 1) * stride
        last = places[-1]
        if last not in lit:
            lit[last] = [rollout(recorded[i:], last) for i in range(4)]
        for i, (share, place) in enumerate(zip(lit[last], places, strict=True)):
            below = slice(last[0] * 2 ** (3 - i), (last[0] + 1) * 2 ** (3 - i))
            columns = slice(last[1] * 2 ** (3 - i), (last[1] + 1) * 2 ** (3 - i))
            expected = torch.zeros(maps[i], maps[i])
            expected[below, columns] = 1
            assert ((share > 0) == (expected > 0)).all()  # what the position of the last map stands for
            assert share[place] > 0
            assert share.sum().item() == pytest.approx(1, abs=1e-5)


def pointing(grid_size=4, pool_size=2):
    """An attention whose every query asks for a large first channel: each position looks where that is largest."""
    layer = HierarchicalAttention(4, 4, grid_size, pool_size)
    with torch.no_grad():
        for convolution in (layer.qkv, layer.q, layer.kv):
            convolution.weight.zero_()
            convolution.bias.zero_()
        layer.qkv.bias[0] = layer.q.bias[0] = 40.0  # the query, the same everywhere
        layer.qkv.weight[4, 0] = layer.kv.weight[0, 0] = 1.0  # the key is the first channel
    return layer


def test_attention_that_must_point_at_a_bright_position_does():
    x = torch.zeros(1, 4, 12, 8)
    x[0, 0, 5, 6] = 8.0  # in the grid of rows 4-7 and columns 4-7, in the pooled position (2, 3)
    with torch.no_grad():
        weights = attention_weights(pointing(), x)
    inside, elsewhere = point_attention(weights, 7, 4, head=0), point_attention(weights, 0, 0)
    assert (inside.top, inside.left) == (4, 4)
    assert inside.local.shape == (4, 4)
    assert inside.local[5 - 4, 6 - 4] > 0.99
    torch.testing.assert_close(elsewhere.local, torch.full((4, 4), 1 / 16))  # nothing bright in that grid
    for view in (inside, elsewhere):
        assert view.global_.shape == (6, 4)
        assert view.global_[2, 3] > 0.99


def test_rollout_through_attention_that_points_somewhere_ends_there():
    x = torch.zeros(1, 4, 12, 8)
    x[0, 0, 5, 6] = 8.0
    with torch.no_grad():
        weights = attention_weights(pointing(), x)
    share = rollout([[weights]], (0, 0))
    assert share.sum().item() == pytest.approx(1)
    # half stays by the residual of the block, half of the rest by that of A1, half of that spread over its own grid
    assert share[0, 0].item() == pytest.approx(1 / 2 + 1 / 8 + 1 / 8 / 16)
    # the global step gives each of the 2×2 of the pool a quarter; each keeps half, and sends half to the bright one
    assert share[5, 6].item() == pytest.approx(1 / 4 * (1 / 8 + 4 * 1 / 8), rel=0.02)
    assert share[4, 6].item() == pytest.approx(1 / 4 * 1 / 8, rel=0.02)


SPOT = (9, 6)
"""Row and column of the one bright position of :func:`spotted`."""


def spotted():
    """Weights on a map of 12×8 of an input of 46×30, all of which point at SPOT, and an image of 300×276.

    A position is 40 pixels of the image wide and 24 high; the last ones reach beyond it.
    """
    x = torch.zeros(1, 4, 12, 8)
    x[0, 0, SPOT[0], SPOT[1]] = 8.0
    with torch.no_grad():
        weights = attention_weights(pointing(), x, 4, (46, 30))
    return [[weights]], Image.new("RGB", (300, 276))


def test_the_strongest_weights_are_named_by_row_and_column_of_the_stage():
    recorded, image = spotted()
    rows = look(recorded, image, (210, 270), stage=2).strongest(1)  # row 11, column 5: in the grid of the spot
    assert [(row["step"], row["row"], row["column"]) for row in rows] == [("local", 9, 6), ("global (pooled)", 8, 6)]
    assert all(row["weight"] > 0.99 for row in rows)


def drawn(figure):
    """The panels of a figure and, of each but the first, its colour bar."""
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    panels = [axes for axes in figure.axes if axes not in bars]
    assert len(bars) == len(panels) - 1
    return panels, bars


def test_what_is_drawn_lies_where_the_weights_point():
    recorded, image = spotted()
    figure = attention_figure(image, look(recorded, image, (210, 270), stage=2))
    panels, bars = drawn(figure)
    local, global_, rolled = (np.ma.filled(axes.images[-1].get_array(), np.nan) for axes in panels[1:4])
    for axes, values in zip(bars, (local, global_, rolled), strict=False):
        assert axes.get_xlim() == pytest.approx((np.nanmin(values), np.nanmax(values)))
    for axes in panels:
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 300), (276, 0))
        assert [shown.origin for shown in axes.images] == ["upper"] * len(axes.images)
        for shown in axes.images:
            beyond = shown.get_array().shape[:2] == (12, 8)  # a map; else the image, in colour or in grey
            assert shown.get_extent() == pytest.approx([0, 320, 288, 0] if beyond else [0, 300, 276, 0])
    painted = np.zeros((12, 8), bool)
    painted[8:12, 4:8] = True  # the grid of row 11 and column 5
    assert (np.isfinite(local) == painted).all()
    assert np.unravel_index(np.nanargmax(local), local.shape) == SPOT
    pooled = np.zeros((12, 8), bool)
    pooled[8:10, 6:8] = True  # the 2×2 that hold the spot
    assert ((global_ > 0.5) == pooled).all()
    assert rolled[11, 5] > 0.6  # by the residuals
    (frame,) = panels[0].patches
    assert frame.get_xy() == pytest.approx((160, 192))
    assert (frame.get_width(), frame.get_height()) == pytest.approx((140, 84))  # 160×96, cut off at the image


@pytest.mark.parametrize("size", [(64, 96), (37, 50), (224, 224)])
@pytest.mark.parametrize("point", [None, (0, 1)])
def test_rollout_over_a_model_is_a_distribution_over_the_first_map(size, point):
    torch.manual_seed(0)
    recorded = record_weights(HATNet(**SMALL), torch.randn(1, 3, *size))
    assert [len(stage) for stage in recorded] == [1, 2, 1, 1]
    share = rollout(recorded, point)
    assert share.shape == (-(-size[0] // 4), -(-size[1] // 4))
    assert share.min() >= 0
    assert share.sum().item() == pytest.approx(1, abs=1e-5)


def test_a_point_is_found_on_the_map_of_a_stage():
    image = Image.new("RGB", (300, 200))
    recorded = record_weights(HATNet(**SMALL), torch.zeros(1, 3, 64, 96))
    assert to_position((299, 0), image, recorded[0][0]) == (0, 23)
    assert to_position((0, 199.9), image, recorded[2][0]) == (3, 0)
    view = look(recorded, image, (150, 100), stage=3, block=0, head=1)
    assert (view.attention.row, view.attention.column) == (4, 6)
    assert (view.stage, view.block, view.head) == (3, 0, 1)
    record = view.record()
    assert len(record["global"]) * len(record["global"][0]) == view.attention.global_.numel()
    assert sum(map(sum, record["local"])) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"point": (300, 0)}, ("point", "300×200", "x=300", "y=0")),
        ({"point": (0, -1)}, ("point", "300×200", "x=0", "y=-1")),
        ({"point": (float("nan"), 0)}, ("point", "300×200", "x=nan", "y=0")),
        ({"stage": 6}, ("stage", 2, 5, 6)),
        ({"block": 2}, ("block", "stage 3", 0, 1, 2)),
        ({"block": -1}, ("block", "stage 3", 0, 1, -1)),
        ({"head": 2}, ("head", 0, 1, 2)),
    ],
)
def test_what_is_not_there_is_refused_by_name(arguments, named):
    recorded = record_weights(HATNet(**SMALL), torch.zeros(1, 3, 64, 96))
    with raises(ValueError, *named):
        look(recorded, Image.new("RGB", (300, 200)), **{"point": (0, 0), "stage": 3, **arguments})


def test_a_picture_shows_the_point_in_every_panel(tmp_path):
    image = Image.linear_gradient("L").resize((120, 80)).convert("RGB")
    model = HATNet(**SMALL)
    recorded = record_weights(model, to_input(image, (64, 96), (0.5,) * 3, (0.5,) * 3))
    for stage, number in ((2, 5), (5, 4)):  # stage 5 has no local step
        figure = attention_figure(image, look(recorded, image, (70, 30), stage))
        panels, _ = drawn(figure)
        assert len(panels) == number
        marks = [line for axes in panels for line in axes.lines]
        assert [line.get_xydata().tolist() for line in marks] == [[[70, 30]]] * number
        assert len(panels[0].patches) == (1 if stage == 2 else 0)  # the frame of the grid
        heading = panels[number - 3].get_title()
        check(heading, "global", "2×3")
        assert ("pooled" in heading) == (stage == 2)
        save_figure(figure, tmp_path / f"{stage}.png")
        with Image.open(tmp_path / f"{stage}.png") as saved:
            assert saved.convert("RGB").getcolors(100) is None  # more colours than that


@pytest.mark.parametrize("size", [(300, 300), (1200, 200), (120, 900), (640, 480)])
@pytest.mark.parametrize("stage", [2, 5])
def test_headings_are_legible_and_apart_whatever_the_image(size, stage):
    recorded = record_weights(HATNet(**SMALL), torch.zeros(1, 3, 64, 96))
    image = Image.new("RGB", size)
    figure = attention_figure(image, look(recorded, image, (1, 1), stage), describe_weights(None, "hatnet_tiny"))
    figure.draw_without_rendering()
    panels, bars = drawn(figure)
    titles = [figure.get_suptitle() and figure.texts[0], *(axes.title for axes in panels)]
    boxes = [text.get_window_extent() for text in titles]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(text.get_fontsize() >= 11 for text in titles)
    assert figure.get_figwidth() <= 12  # shown 800 pixels wide, 11 points are 10 pixels
    assert all(axes.get_xlabel() for axes in bars)


def test_untrained_weights_are_named_on_the_picture():
    recorded, image = spotted()
    view = look(recorded, image, (210, 270), stage=2)
    for arguments, named in (
        ({"checkpoint": None, "variant": "hatnet_tiny"}, ("Random", "hatnet_tiny", "untrained")),
        ({"checkpoint": Path("runs/small"), "variant": None}, ("runs/small",)),
        ({"checkpoint": None, "variant": "hatnet_small", "pretrained": True}, ("Released", "hatnet_small")),
    ):
        title = attention_figure(image, view, describe_weights(**arguments)).get_suptitle()
        check(title, *named)
        assert ("Random" in title) == (named[0] == "Random")


def test_what_is_not_pooled_is_not_called_so():
    recorded = record_weights(HATNet(**SMALL), torch.zeros(1, 3, 64, 96))
    image = Image.new("RGB", (300, 200))
    steps = {stage: {row["step"] for row in look(recorded, image, (0, 0), stage).strongest()} for stage in (4, 5)}
    assert steps == {4: {"local", "global (pooled)"}, 5: {"global"}}


@pytest.mark.parametrize("size", [(64, 96), (32, 33), (250, 147)])
def test_weights_that_would_take_too_much_memory_are_refused_by_what_they_take(size, monkeypatch):
    model = HATNet(**SMALL)
    blocks = [block for stage in record_weights(model, torch.zeros(1, 3, *size)) for block in stage]
    need = sum(weights.nbytes for block in blocks for weights in (block.local, block.global_) if weights is not None)
    monkeypatch.setattr("hatnet_analysis.attention_maps.MAX_BYTES", need)
    check_size(model, size)
    monkeypatch.setattr("hatnet_analysis.attention_maps.MAX_BYTES", need - 1)
    with raises(ValueError, "GiB", f"{(need - 1) / 2**30:g}"):
        check_size(model, size)
