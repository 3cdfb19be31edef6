"""Growth, measured on the attention layers and compared with what they have to allocate."""

import json
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hatnet_analysis.figures import growth_figure, save_figure
from hatnet_analysis.growth import (
    CONTENDERS,
    crossings,
    exponents,
    fastest_rate,
    growth,
)
from hatnet_analysis.memory import peak_memory
from hatnet_analysis.tables import render
from hatnet_testing import check, raises

SIZES = (64, 128, 256)


@pytest.fixture(scope="module")
def rows():
    return growth(SIZES, rounds=1)


def test_every_contender_is_measured_in_both_ways_at_every_size(rows):
    assert [(row["attention"], row["size"]) for row in rows] == [(c.name, size) for c in CONTENDERS for size in SIZES]
    for row in rows:
        for way in ("fused", "materialised"):
            lowest, median, highest = (row[f"seconds_{way}{end}"] for end in ("_lowest", "", "_highest"))
            assert 0 < lowest <= median <= highest
        assert row["measured_macs"] == row["macs"]  # counted on the layer, and by its formula
        assert row["not_measured"] is None


def test_materialised_attention_holds_its_weights_twice_and_the_fused_one_does_not(rows):
    for row in rows:
        assert row["memory_materialised"] >= 2 * 4 * row["weights"]  # before and after the softmax
    quadratic = next(row for row in rows if row["attention"] == "MHSA" and row["size"] == 256)
    assert quadratic["memory_fused"] < 4 * quadratic["weights"]


@pytest.mark.parametrize("size", [224, 320, 448])
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_the_measured_peak_of_the_plain_products_is_the_formulas_within_three_percent(contender, size):
    layer, x = contender.build().eval(), torch.randn(1, 64, size // 4, size // 4)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        peak = peak_memory(lambda: layer(x), x.device)
    assert peak == pytest.approx(contender.formula("memory_formula", size), rel=0.03)


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
        {"attention": c.name, "size": size, "macs": size**4, "seconds_fused": size**2}
        | {"memory_fused": size if c.name == "window (Swin)" else None, "memory_materialised": size}
        for c in CONTENDERS
        for size in (128, 256)
    ]
    for row in exponents(made):
        assert row["power_of_macs"] == pytest.approx(2)
        assert row["power_of_seconds_fused"] == pytest.approx(1)
        assert row["power_of_memory_materialised"] == pytest.approx(0.5)
        assert row["power_of_memory_fused"] == (0.5 if row["attention"] == "window (Swin)" else None)
    shown = render(exponents(made), "table").splitlines()[2].split()
    assert shown == ["MHSA", "2.00", "1.00", "-", "0.50"]


def by_pair(rows, quantity):
    return {(row["slower"], row["faster"]): row["crossing"] for row in crossings(rows) if row["quantity"] == quantity}


def test_formulas_cross_at_the_roots_worked_out_by_hand():
    # a position's multiply-adds over C are linear in the number of positions P; the side of the image is 4√P
    assert by_pair([], "macs") == {
        # 3C + 2P = 4C + 2·8² + 2(C + P)/8², with C = 64
        ("MHSA", "H-MHSA"): pytest.approx(4 * math.sqrt((64 + 128 + 2) / (2 - 1 / 32))),
        ("MHSA", "window (Swin)"): pytest.approx(4 * math.sqrt(8 * 8)),  # 2P = 2·8²
        # 2C + 2(C + P)/8² = 3C + 2·8²
        ("spatial reduction (PVT)", "window (Swin)"): pytest.approx(4 * math.sqrt(32 * (64 + 128 - 2))),
        # the first costs more at every size: 2P > 2P/8² and so on, term by term
        ("MHSA", "spatial reduction (PVT)"): None,
        ("H-MHSA", "spatial reduction (PVT)"): None,
        ("H-MHSA", "window (Swin)"): None,
    }


def test_a_crossing_of_the_formulas_of_memory_is_where_the_order_changes_for_good():
    contenders = {contender.name: contender for contender in CONTENDERS}
    found = by_pair([], "memory_formula")
    # by hand: 4(4P·64 + 3P) + 9P²/64 of H-MHSA's global step meets 4·10P·64 + 18·64P of the windows, P positions
    by_hand = (4 * 10 * 64 + 18 * 64 - 4 * (4 * 64 + 3)) * 64 / 9
    assert found["H-MHSA", "window (Swin)"] == pytest.approx(4 * math.sqrt(by_hand), abs=1)
    crossed = {pair: crossing for pair, crossing in found.items() if crossing is not None}
    assert len(crossed) == 4
    for (slower, faster), crossing in crossed.items():
        for size in range(32, 4096, 32):
            memory = [contenders[name].formula("memory_formula", size) for name in (slower, faster)]
            assert (memory[0] > memory[1]) == (size > crossing)


def measured(seconds):
    """Rows of contenders' seconds by size, or of their lowest and highest; nothing of the others."""
    rows = []
    for name, series in seconds.items():
        for size, value in series.items():
            lowest, highest = value if isinstance(value, tuple) else (value, value)
            row = {"attention": name, "size": size, "seconds_fused": (lowest * highest) ** 0.5}
            row |= {"seconds_fused_lowest": lowest, "seconds_fused_highest": highest}
            rows.append(row | dict.fromkeys(("seconds_materialised", "memory_materialised")))
    return rows


def test_a_measured_crossing_lies_between_the_sizes_where_the_order_changes():
    rows = measured({"MHSA": {100: 50, 400: 800}, "H-MHSA": {100: 100, 400: 400}})  # size²/200 and size
    assert by_pair(rows, "seconds_fused") == {("MHSA", "H-MHSA"): pytest.approx(200)}
    assert by_pair(rows, "seconds_materialised") == by_pair(rows, "memory_materialised") == {}


def test_a_later_contender_may_be_the_one_that_becomes_slower():
    rows = measured({"MHSA": {100: 100, 400: 400}, "H-MHSA": {100: 50, 400: 800}})
    assert by_pair(rows, "seconds_fused") == {("H-MHSA", "MHSA"): pytest.approx(200)}


def test_of_several_changes_of_a_measured_order_the_last_one_counts():
    rows = measured({"MHSA": {100: 2, 200: 1, 400: 2, 800: 1, 1600: 4}, "window (Swin)": {100: 1, 200: 2, 400: 1}})
    assert by_pair(rows, "seconds_fused") == {("MHSA", "window (Swin)"): pytest.approx(math.sqrt(200 * 400))}


def test_an_order_that_never_changes_is_named_without_a_crossing():
    rows = measured({"MHSA": {100: 1, 200: 2}, "window (Swin)": {100: 3, 200: 4}})
    assert by_pair(rows, "seconds_fused") == {("window (Swin)", "MHSA"): None}


def bracket(rows):
    """Slower and faster one, crossing and sizes between of the one pair that was measured."""
    (row,) = (row for row in crossings(rows) if row["quantity"] == "seconds_fused")
    return row["slower"], row["faster"], row["crossing"], row["between"]


def test_a_crossing_of_times_is_named_where_the_spreads_are_apart_on_both_sides_of_it():
    clear = measured({"MHSA": {100: (40, 60), 400: (700, 900)}, "H-MHSA": {100: (80, 120), 400: (300, 500)}})
    slower, faster, crossing, between = bracket(clear)
    assert (slower, faster, between) == ("MHSA", "H-MHSA", None)
    assert 100 < crossing < 400


def test_where_spreads_overlap_the_crossing_lies_between_the_nearest_sizes_that_are_clear():
    rows = measured(
        {
            "H-MHSA": {224: (2, 3), 320: (6, 8), 448: (13, 15), 640: (50, 60), 1024: (300, 400)},
            "window (Swin)": {224: (4, 5), 320: (9, 9.5), 448: (13.9, 14.1), 640: (30, 40), 1024: (90, 91)},
        }
    )
    assert bracket(rows) == ("H-MHSA", "window (Swin)", None, [320, 640])


def test_an_order_that_is_clear_from_some_size_on_alone_is_not_called_one_at_every_size():
    rows = measured({"MHSA": {100: (1, 3), 200: (5, 6)}, "window (Swin)": {100: (2, 4), 200: (1, 2)}})
    assert bracket(rows) == ("MHSA", "window (Swin)", None, [None, 200])


def test_an_order_that_gets_unclear_again_counts_from_where_it_stays():
    rows = measured(
        {
            "MHSA": {100: (1, 1), 200: (5, 6), 400: (5, 9), 800: (20, 21)},
            "window (Swin)": {100: (2, 2), 200: (1, 2), 400: (6, 7), 800: (8, 9)},
        }
    )
    assert bracket(rows) == ("MHSA", "window (Swin)", None, [100, 800])


def test_a_pair_whose_order_is_open_at_the_largest_size_is_left_out():
    rows = measured({"MHSA": {100: (1, 1), 200: (3, 6)}, "window (Swin)": {100: (2, 2), 200: (4, 5)}})
    assert by_pair(rows, "seconds_fused") == {}


def test_the_fastest_rate_is_that_of_one_point_of_all_contenders_and_ways():
    made = [
        {"macs": 100, "seconds_materialised": 4.0, "seconds_fused": 2.0},
        {"macs": 300, "seconds_materialised": 5.0, "seconds_fused": None},
    ]
    assert fastest_rate(made) == 60
    assert fastest_rate([{"macs": 1, "seconds_materialised": None, "seconds_fused": None}]) is None


def test_what_would_not_fit_or_take_too_long_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr("hatnet_analysis.growth.MEMORY_SHARE", 1e-9)
    row = growth((64,), rounds=1)[0]
    assert row["memory_materialised"] is None
    assert row["memory_fused"] is not None
    check(row["not_measured"], "materialised")
    monkeypatch.setattr("hatnet_analysis.growth.MAX_MACS", 1)
    row = growth((64,), rounds=1)[0]
    assert row["seconds_fused"] is None
    assert row["not_measured"]


def test_sizes_in_any_order_are_measured_once_and_in_order():
    rows = growth((64, 32, 64), rounds=1)
    assert [row["size"] for row in rows] == [32, 64] * len(CONTENDERS)
    assert all(row["power_of_macs"] > 0 for row in exponents(rows))


@pytest.mark.parametrize("size", [0, 100, -32])
def test_a_size_that_is_no_multiple_of_32_is_refused(size):
    with raises(ValueError, "sizes", 32, size):
        growth((size,))


def curves(axes):
    """Of each contender, in order: its line and its dots, by size."""
    lines = [line for line in axes.lines if line.get_linestyle() == "-" and line.get_marker() == "None"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    return [
        tuple(dict(zip(*curve.get_data(), strict=True)) for curve in pair) for pair in zip(lines, dots, strict=True)
    ]


def test_the_picture_has_a_panel_for_each_quantity_and_unfitted_lines_under_the_points(rows, tmp_path):
    figure = growth_figure(rows)
    rate = fastest_rate(rows)
    divisors = [("macs", 1e9), ("memory_formula", 1e6), ("macs", rate), ("macs", rate)]
    for axes, (formula, divisor) in zip(figure.axes, divisors, strict=True):
        drawn = curves(axes)
        assert len(drawn) == len(CONTENDERS)
        for contender, (line, dots) in zip(CONTENDERS, drawn, strict=True):
            assert tuple(dots) == SIZES
            assert line == {s: pytest.approx(contender.formula(formula, s) / divisor) for s in range(64, 257, 32)}
    assert all(dots[256] == pytest.approx(line[256], rel=0.03) for line, dots in curves(figure.axes[1]))
    for axes in figure.axes[2:]:
        assert all(dots[size] >= 0.999 * line[size] for line, dots in curves(axes) for size in SIZES)
        assert f"{rate / 1e9:.3g} G/s" in axes.get_title()
    save_figure(figure, tmp_path / "growth.png")
    assert [path.name for path in tmp_path.iterdir()] == ["growth.png"]


def test_other_measurements_do_not_move_the_lines_of_memory(rows):
    doubled = [dict(row) | {"memory_materialised": 2 * row["memory_materialised"]} for row in rows]
    before, after = (curves(growth_figure(made).axes[1]) for made in (rows, doubled))
    assert [line for line, _ in before] == [line for line, _ in after]
    assert [dots for _, dots in before] != [dots for _, dots in after]


def test_rows_of_a_report_are_read_like_measured_ones(rows):
    report = json.loads(render(rows, "json"))
    assert crossings(report) == crossings(rows)
    assert exponents(report) == exponents(rows)
    drawn, measured = (list(map(curves, growth_figure(made).axes)) for made in (report, rows))
    assert drawn == measured


def test_crossings_are_marked_in_the_picture_with_their_size(rows):
    stretched = [dict(row) | {"size": size} for row in rows for size in (row["size"], 8 * row["size"])]  # up to 2048
    figure = growth_figure(stretched)
    marks = [[line for line in axes.lines if line.get_marker() == "D"] for axes in figure.axes[:2]]
    assert [text.get_text() for text in figure.axes[0].texts] == ["312"]
    assert [text.get_text() for text in figure.axes[1].texts] == ["69", "552", "578"]
    assert [line.get_xdata()[0] for line in marks[0]] == [pytest.approx(311.9, abs=0.05)]
    windows = curves(figure.axes[0])[3][0]
    assert windows[288] < marks[0][0].get_ydata()[0] < windows[320]


def test_a_picture_without_a_timed_point_has_no_lines_of_time(rows):
    untimed = [dict(row) | {"seconds_materialised": None, "seconds_fused": None} for row in rows]
    assert all(line == dots == {} for axes in growth_figure(untimed).axes[2:] for line, dots in curves(axes))
