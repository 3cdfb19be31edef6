"""The page of results in headless Chromium, wide and narrow, light and dark; ``nox -s browser`` runs this."""

import os
from contextlib import contextmanager

import numpy as np
import pytest
from playwright.sync_api import sync_playwright

from hatnet_train.data.source import Digits
from hatnet_train.page import run_page, write_page
from hatnet_train.recipes import build_config
from hatnet_train.results import Results

CHROMIUM = os.environ["CHROMIUM"]

SIZES = {"desktop": (1250, 900), "phone": (390, 844)}


@pytest.fixture(scope="module", params=["ten", "hundred"])
def written(request, tmp_path_factory):
    """A page about the digits after two epochs, or about as many images of a hundred classes with long names."""
    held_out = Digits(train=False)
    if request.param == "hundred":
        held_out.classes = tuple(f"a rather long name of class {i}" for i in range(100))
        held_out.labels = np.arange(len(held_out)) % 100
    number, rng = len(held_out.classes), np.random.default_rng(0)
    wrong = rng.random(len(held_out)) < 0.2
    predictions = np.where(wrong, rng.integers(0, number, len(held_out)), held_out.labels)
    places = np.arange(len(held_out))
    results = Results(held_out.classes, places, held_out.labels, predictions, rng.uniform(0.1, 1, len(held_out)))
    top1 = 100 * results.correct.mean()
    rows = [{"epoch": i + 1, "train_loss": 2 - i, "eval_loss": 1.9 - i, "top1": top1, "top5": 99.0} for i in range(2)]
    path = tmp_path_factory.mktemp("page") / "results.html"
    write_page(run_page("runs/digits", build_config("digits", {}), 1437, held_out, results, rows), path)
    return path, results


@contextmanager
def opened(path, size="desktop", scheme="light"):
    """The open page; an error on its console, or a request for anything but itself, fails the test."""
    complaints = []
    width, height = SIZES[size]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on(
                "request",
                lambda one: None if one.url.startswith(("file:", "data:")) else complaints.append(one.url[:100]),
            )
            tab.goto(path.as_uri())
            yield tab
            assert complaints == []
        finally:
            browser.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_screen_and_shows_all_its_pictures(written, size, scheme):
    with opened(written[0], size, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
        page.wait_for_function("[...document.images].every(image => image.complete)")
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
        assert page.locator("#pictures img").count() == 24
        colour = page.evaluate("getComputedStyle(document.body).color")
        assert colour == {"light": "rgb(0, 0, 0)", "dark": "rgb(255, 255, 255)"}[scheme]


def test_a_click_or_a_key_on_a_heading_sorts_the_classes(written):
    path, results = written
    counted = [row for row in results.per_class() if row["images"]]
    with opened(path) as page:

        def column(number):
            return page.locator(f"#per-class tbody tr td:nth-child({number})").all_inner_texts()

        assert column(1) == [row["class"] for row in counted]
        page.get_by_role("button", name="top-1").click()
        shown = [float(text.split()[0]) for text in column(2)]
        assert shown == sorted(shown)
        assert shown == pytest.approx(sorted(row["top1"] for row in counted), abs=0.06)
        page.get_by_role("button", name="images").focus()
        page.keyboard.press("Enter")
        page.keyboard.press("Enter")
        assert [int(text) for text in column(3)] == sorted((row["images"] for row in counted), reverse=True)
