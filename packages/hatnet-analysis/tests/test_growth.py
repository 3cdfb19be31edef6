"""Growth is measured on the attention layers themselves; its points are held against what they have to allocate."""

import pytest

from hatnet_analysis.figures import growth_figure, save_figure
from hatnet_analysis.growth import CONTENDERS, crossings, exponents, growth
from hatnet_analysis.tables import render

SIZES = (64, 128, 256)


@pytest.fixture(scope="module")
def rows():
    return growth(SIZES, rounds=1)


def test_every_contender_is_measured_in_both_ways_at_every_size(rows):
    assert [(row["attention"], row["size"]) for row in rows] == [(c.name, size) for c in CONTENDERS for size in SIZES]
    for row in rows:
        assert row["seconds_fused"] > 0
        assert row["measured_macs"] == row["macs"]  # counted on the layer, and by its formula
        assert row["not_measured"] is None


def test_materialised_attention_holds_its_weights_twice_and_the_fused_one_does_not(rows):
    for row in rows:
        assert row["memory_materialised"] >= 2 * 4 * row["weights"]  # before and after the softmax
    quadratic = next(row for row in rows if row["attention"] == "MHSA" and row["size"] == 256)
    assert quadratic["memory_fused"] < 4 * quadratic["weights"]


def test_weights_are_counted_by_hand_at_one_size(rows):
    at_256 = {row["attention"]: row["weights"] for row in rows if row["size"] == 256}
    positions = 64 * 64
    assert at_256 == {
        "MHSA": positions**2,
        "spatial reduction (PVT)": positions**2 // 64,
        "H-MHSA": positions * max(64, positions // 64),
        "window (Swin)": positions * 64,
    }


def test_the_powers_are_those_of_the_formulas():
    made = [
        {"attention": c.name, "size": size, "macs": size**4, "seconds_fused": size**2, "memory_fused": None}
        | {"memory_materialised": size}
        for c in CONTENDERS
        for size in (128, 256)
    ]
    for row in exponents(made):
        assert row["power_of_macs"] == pytest.approx(2)
        assert row["power_of_seconds_fused"] == pytest.approx(1)
        assert row["power_of_memory_materialised"] == pytest.approx(0.5)
        assert row["power_of_memory_fused"] is None
    shown = render(exponents(made), "table").splitlines()[2].split()
    assert shown == ["MHSA", "2.00", "1.00", "-", "0.50"]


def test_mhsa_becomes_dearer_than_h_mhsa_where_the_two_formulas_meet(rows):
    by_pair = {(row["first"], row["second"]): row for row in crossings(rows) if row["quantity"] == "macs"}
    # 3C + 2HW = 4C + 2·8² + 2(C + HW)/8² with C = 64 meets at HW = 98.5, a map of 9.9², an image of 39.7²
    assert by_pair["MHSA", "H-MHSA"]["crossing"] == 64
    # H-MHSA has 2HWC(C + G1²) more than spatial reduction of the same rate, at every size
    assert by_pair["spatial reduction (PVT)", "H-MHSA"]["crossing"] is None


def test_a_measured_crossing_lies_between_the_sizes_where_the_order_changes():
    made = []
    for contender in CONTENDERS:
        for size in (100, 400):
            seconds = {"MHSA": size**2 / 200, "H-MHSA": size}.get(contender.name)
            row = {"attention": contender.name, "size": size, "seconds_fused": seconds}
            made.append(row | {"memory_materialised": None})
    found = {(row["first"], row["second"]): row["crossing"] for row in crossings(made) if row["quantity"] != "macs"}
    pairs = [row for row in crossings(made) if row["quantity"] == "seconds_fused" and row["crossing"]]
    assert [(row["first"], row["second"]) for row in pairs] == [("MHSA", "H-MHSA")]
    assert pairs[0]["crossing"] == pytest.approx(200)
    assert found


def test_what_would_not_fit_or_take_too_long_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr("hatnet_analysis.growth.MEMORY_SHARE", 1e-9)
    row = growth((64,), rounds=1)[0]
    assert row["memory_materialised"] is None
    assert row["memory_fused"] is not None
    assert row["not_measured"].startswith("materialised: ")
    monkeypatch.setattr("hatnet_analysis.growth.MAX_MACS", 1)
    row = growth((64,), rounds=1)[0]
    assert row["seconds_fused"] is None
    assert row["not_measured"].startswith("both ways: ")


def test_sizes_in_any_order_are_measured_once_and_in_order():
    rows = growth((64, 32, 64), rounds=1)
    assert [row["size"] for row in rows] == [32, 64] * len(CONTENDERS)
    assert all(row["power_of_macs"] > 0 for row in exponents(rows))


@pytest.mark.parametrize("size", [0, 100, -32])
def test_a_size_that_is_no_multiple_of_32_is_refused(size):
    with pytest.raises(ValueError, match=f"sizes must be multiples of 32, got {size}"):
        growth((size,))


def test_the_picture_has_a_panel_for_each_quantity_and_a_line_for_each_contender(rows, tmp_path):
    figure = growth_figure(rows)
    for axes, points in zip(figure.axes, (3, 3, 3), strict=True):
        lines = [line for line in axes.lines if line.get_linestyle() == "-"]
        assert len(lines) == len(CONTENDERS)
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        assert [len(line.get_xdata()) for line in dots] == [points] * len(CONTENDERS)
    save_figure(figure, tmp_path / "growth.png")
    assert [path.name for path in tmp_path.iterdir()] == ["growth.png"]
