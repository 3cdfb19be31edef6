"""Test the pages as a whole; ``conftest.py`` runs their blocks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from extension import RUN, SKIP

DOCS = Path(__file__).parent

PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]

SHOWN = {"text", "html", "json"}
"""Languages of blocks that are only shown; MyST's directives, in braces, are no blocks."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_block_is_run_or_its_page_says_why_not(page):
    text = page.read_text()
    languages = re.findall(r"^ *(?:```|~~~)(\w+)", text, re.MULTILINE)
    assert set(languages) <= RUN | SHOWN, f"{page.name}: expected blocks of {sorted(RUN | SHOWN)}"
    skips = re.findall(r"^ *<!--\s*skip:.*", text, re.MULTILINE)
    assert [skip for skip in skips if not (SKIP.match(skip.strip()) or "skip: end" in skip)] == []
