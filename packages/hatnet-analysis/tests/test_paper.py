"""Tables 1 and 2 reproduce for HAT-Net; verdicts are what a reader with a pencil would write."""

import json

import pytest

from hatnet_analysis.paper import _flops_verdict, _verdict, memory_rows, table_rows
from hatnet_analysis.peers import PaperRow, table_2, table_3, table_4, table_6

KEYS = {
    "table",
    "model",
    "params_m",
    "paper_params_m",
    "flops_g_paper_convention",
    "flops_g_complete",
    "paper_flops_g",
}


def rows_of(monkeypatch, table, keep):
    """The table with the rows alone that ``keep`` takes; its own code for the rest."""
    define = {"2": table_2, "3": table_3, "4": table_4, "6": table_6}[table]
    chosen = [row for row in define() if keep(row)]
    monkeypatch.setattr(f"hatnet_analysis.paper.table_{table}", lambda: chosen)
    return {row["model"]: row for row in table_rows(table)}


def test_table_1_reproduces_to_the_digit_and_in_every_stage():
    rows = table_rows("1")
    assert [row["paper_params_m"] for row in rows] == [12.7, 25.7, 42.9, 63.1]
    for row in rows:
        assert row.keys() >= KEYS
        assert row["verdict_params"] == row["verdict_stages"] == "equal"
        assert row["stages"] == row["paper_stages"]


def test_table_2_reproduces_to_the_digit_for_hat_net_in_the_papers_convention(monkeypatch):
    rows = rows_of(monkeypatch, "2", lambda row: row.model.startswith("HAT-Net"))
    assert [row["paper_flops_g"] for row in rows.values()] == [2.0, 4.3, 8.3, 11.5]
    for row in rows.values():
        assert row.keys() >= KEYS
        assert row["verdict_params"] == "equal"
        assert row["verdict_flops"] == "equal (paper convention)"
        assert row["accuracy"] == "not measured here"
        assert row["paper_accuracy"]["top-1"] > 79


def test_peers_of_table_2_are_measured_or_listed_without_a_figure(monkeypatch):
    rows = rows_of(monkeypatch, "2", lambda row: row.model in ("ResNet18", "CvT-13", "PVTv2-B1"))
    assert rows["ResNet18"]["verdict_params"] == rows["ResNet18"]["verdict_flops"] == "equal"
    assert rows["CvT-13"]["params_m"] is None
    assert rows["CvT-13"]["verdict_flops"] == "not built"
    assert "neither timm nor MMDetection" in rows["CvT-13"]["source"]
    assert rows["PVTv2-B1"]["verdict_params"] == "differs by +0.91"
    assert "0.9 M more than is printed" in rows["PVTv2-B1"]["reason"]


def test_a_detector_of_table_4_counts_as_was_found_with_another_program(monkeypatch):
    pytest.importorskip("mmdet")
    rows = rows_of(monkeypatch, "4", lambda row: row.model in ("RetinaNet, HAT-Net-Tiny", "RetinaNet, R-50"))
    tiny = rows["RetinaNet, HAT-Net-Tiny"]
    assert tiny["flops_g_complete"] == pytest.approx(203.3, abs=0.05)
    assert tiny["difference_params_m"] == tiny["params_m"] - 21.6
    assert tiny["difference_flops_g_complete"] == tiny["flops_g_complete"] - 212
    assert tiny["params_m"] == pytest.approx(22.16, abs=0.005)
    assert "0.5 M below" in tiny["reason"]
    r50 = rows["RetinaNet, R-50"]
    assert r50["verdict_flops"] == "equal"
    assert r50["verdict_params"] == "equal (without the layers that are frozen)"


@pytest.mark.slow
@pytest.mark.parametrize("table", ["3", "4", "6"])
def test_hat_nets_dense_rows_have_the_printed_parameters(table):
    for row in table_rows(table):
        if "HAT-Net" in row["model"] and "Tiny" not in row["model"]:
            assert row["params_m"] == pytest.approx(row["paper_params_m"], abs=0.06)
        if table == "6":  # the paper's differences: +35, +10, 0, -12, +6, -3
            assert row["difference_g_complete"] == pytest.approx(row["paper_difference_g"], abs=3)


@pytest.mark.parametrize(
    ("measured", "printed", "verdict"),
    [
        (25.739, "25.7", "equal"),
        (45.6, "46", "equal"),
        (24.061, "24.0", "equal (cut, not rounded)"),
        (16.47, "15.9", "differs by +0.57"),
    ],
)
def test_a_figure_is_equal_if_it_would_be_printed_so(measured, printed, verdict):
    assert _verdict(measured, printed) == verdict


@pytest.mark.parametrize(
    ("paper", "complete", "printed", "verdict"),
    [
        (4.321, 4.576, "4.3", "equal (paper convention)"),
        (4.369, 4.509, "4.5", "equal (complete convention)"),
        (1.82, 1.82, "1.8", "equal"),
        (8.54, 8.769, "8.7", "equal (complete convention; cut, not rounded)"),
        (90.0, 110.0, "100", "differs by -10.0 % (paper convention), +10.0 % (complete)"),
    ],
)
def test_flops_are_held_against_both_conventions(paper, complete, printed, verdict):
    assert _flops_verdict(paper, complete, printed) == verdict


def test_every_row_of_the_paper_is_there_and_hat_net_always_ours():
    for define, number in ((table_2, 43), (table_3, 23), (table_4, 38), (table_6, 6)):
        rows = define()
        assert len(rows) == number
        assert all(isinstance(row, PaperRow) and float(row.flops_g) > 0 for row in rows)
        assert all("hatnet" in row.source for row in rows if "HAT-Net" in row.model)
    json.dumps([row.accuracy for row in table_4()])


def test_memory_of_silu_and_gelu_is_one_ratio_with_a_verdict():
    silu, gelu = memory_rows(batch=1, size=64)
    assert silu["ratio_to_silu"] == 1
    assert gelu["ratio_to_silu"] == gelu["peak_memory_gib"] / silu["peak_memory_gib"]
    assert gelu["paper_ratio_to_silu"] == pytest.approx(1.178, abs=0.001)
    differs = abs(gelu["ratio_to_silu"] - 23.8 / 20.2) > 0.01
    assert gelu["verdict"].startswith("differs: GELU to SiLU is" if differs else "equal")


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="unknown table '5'; expected one of 1, 2, 3, 4, 6, eq15, memory"):
        table_rows("5")
