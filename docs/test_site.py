"""Test the built site: all public names, figures of today's code, nothing loaded from elsewhere."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from figures.draw import drawn
from sphinx.util.inventory import InventoryFile

DOCS = Path(__file__).parent

SITE = DOCS / "_build/html"

LOADED = re.compile(
    r'<(?:script|img|iframe|source)[^>]* src="(?:https?:)?//|<link[^>]* rel="stylesheet"[^>]* href="https?:'
)
"""Elements whose address a browser fetches without a click."""


@pytest.mark.filterwarnings("ignore")  # of what hatnet_dense imports
@pytest.mark.parametrize("package", ["hatnet_core", "hatnet_train", "hatnet_dense", "hatnet_analysis"])
def test_every_public_name_of_a_package_is_in_the_reference(package):
    with (SITE / "objects.inv").open("rb") as file:
        known = InventoryFile.load(file, "", lambda base, name: name)
    documented = {name for kind, objects in known.items() if kind.startswith("py:") for name in objects}
    assert {f"{package}.{name}" for name in import_module(package).__all__} <= documented


def test_figures_are_those_that_the_code_draws_today(tmp_path):
    for fresh in drawn(tmp_path):
        kept = DOCS / "figures" / fresh.name
        assert kept.read_bytes() == fresh.read_bytes(), f"{kept} is out of date: python docs/figures/draw.py"


def test_pages_load_nothing_from_elsewhere():
    pages = list(SITE.rglob("*.html"))
    assert (SITE / "_static/mathjax/tex-chtml.js").is_file()
    assert len(pages) > 20
    assert [page.name for page in pages if LOADED.search(page.read_text())] == []
