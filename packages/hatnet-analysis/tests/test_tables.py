"""Rows as mappings, as JSON and for readers."""

import json
import re
from dataclasses import dataclass

import pytest

import hatnet_analysis
from hatnet_analysis.growth import CrossingRow
from hatnet_analysis.tables import ParamsRow, Row, column, hidden, megabytes, render


@dataclass(kw_only=True)
class Made(Row):
    name_of_it: str = "a"
    part: str | None = column(optional=True)
    share: float | None = column("share (%)", 0.01, 1, default=None)
    size: int = megabytes("size", 2_400_000)
    steps: int = hidden(3)


def test_a_row_is_a_mapping_of_its_json():
    row = Made(share=0.125)
    assert dict(row) == {"name_of_it": "a", "share": 0.125, "size": 2_400_000, "steps": 3}
    assert json.loads(render([row, {"rows": [row]}], "json")) == [dict(row), {"rows": [dict(row)]}]
    assert row["part"] is None
    assert len(row) == 4
    with pytest.raises(KeyError):
        row["render"]


def test_a_field_declares_its_heading_unit_and_digits():
    heading, _, first, second = render([Made(share=0.125), Made(share=0.5, part="b")], "table").splitlines()
    assert re.split(r" {2,}", heading.strip()) == ["name of it", "part", "share (%)", "size (MB)"]
    assert first.split() == ["a", "-", "12.5", "2"]
    assert second.split() == ["a", "b", "50.0", "2"]


def test_a_column_without_a_value_is_only_in_the_json():
    assert re.split(r" {2,}", render([Made()], "table").splitlines()[0]) == ["name of it", "size (MB)"]
    assert json.loads(render([Made()], "json"))[0]["share"] is None


def test_former_names_still_work():
    row = CrossingRow(slower="MHSA", faster="H-MHSA", quantity="macs", crossing=40.0, between=None)
    assert (row["dearer"], row["cheaper"]) == ("MHSA", "H-MHSA")  # prose: old keys
    assert hatnet_analysis.h_mhsa_macs_completed is hatnet_analysis.h_mhsa_macs_padded
    assert list(ParamsRow(model="hatnet_tiny", params=1)) == ["model", "params"]
