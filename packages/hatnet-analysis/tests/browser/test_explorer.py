"""The report in headless Chromium: opened, clicked, read; ``nox -s browser`` runs this, and nothing else does."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from hatnet_analysis.report import write_report
from hatnet_core import create_model, save_checkpoint

CHROMIUM = os.environ["CHROMIUM"]
BRIGHT = (100, 164)
"""x and y of a white spot, in pixels of an image of 224×224."""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report on an image with one white spot, of weights whose every query in stage 2 asks for brightness."""
    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    model = create_model("hatnet_tiny", num_classes=3)
    with torch.no_grad():
        for convolution in (model.stem.conv1, model.stem.conv2):
            convolution.weight.zero_()
            convolution.bias.zero_()
            convolution.weight[0, : 3 if convolution is model.stem.conv1 else 1] = 0.1  # brightness, in channel 0
        attention = model.stages[0].blocks[0].attn
        for convolution in (attention.qkv, attention.q, attention.kv):
            convolution.weight.zero_()
            convolution.bias.zero_()
        attention.qkv.bias[0] = attention.q.bias[0] = 30
        attention.qkv.weight[48, 0] = attention.kv.weight[0, 0] = 1
    save_checkpoint(model, folder / "model.safetensors")
    image = Image.new("RGB", (224, 224), "black")
    ImageDraw.Draw(image).ellipse([BRIGHT[0] - 5, BRIGHT[1] - 5, BRIGHT[0] + 5, BRIGHT[1] + 5], fill="white")
    image.save(folder / "image.png")
    return write_report(
        folder / "out", ["tables", "attention"], ["1"], folder / "image.png", folder / "model.safetensors"
    )


@pytest.fixture
def page(page_file):
    """The open page; an error on its console, or a request for anything but itself, fails the test."""
    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            tab = browser.new_page(viewport={"width": 1250, "height": 900})
            tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: complaints.append(str(error)))
            tab.on("request", lambda request: complaints.append(request.url[:100]) if is_foreign(request) else None)
            tab.goto(page_file.as_uri())
            tab.wait_for_selector("#explorer-text:not(:empty)")
            yield tab
            assert complaints == []
        finally:
            browser.close()


def is_foreign(request):
    return not request.url.startswith(("file:", "data:"))


def click(page, x, y):
    box = page.locator("#explorer-image").bounding_box()
    place = {"x": x / 224 * box["width"], "y": y / 224 * box["height"]}
    page.locator("#explorer-image").click(position=place)
    return page.locator("#explorer-text").inner_text()


def picture(page, name):
    """A canvas as the browser paints it, as [224, 224, 3]."""
    taken = Image.open(io.BytesIO(page.locator(f"#explorer-{name}").screenshot()))
    return np.asarray(taken.convert("RGB").resize((224, 224), Image.Resampling.NEAREST)).astype(int)


def test_a_click_shows_the_grid_and_the_pooled_position_that_the_weights_point_at(page):
    text = click(page, 90, 150)
    assert text.startswith("stage 2, position (37, 22) of 56×56, grid at (32, 16)")
    assert "strongest pooled position at (40, 24)" in text  # of the spot at row 41, column 25 of the map
    pooled = picture(page, "global")
    cell = pooled[162:190, 98:126].mean((0, 1))  # rows 40-47 and columns 24-31 of the map, in pixels
    elsewhere = pooled[20:40, 20:40].mean((0, 1))
    assert cell[0] > 150 > 60 > elsewhere[0]  # yellow, and black


def test_the_local_map_is_painted_in_the_grid_of_the_point_alone(page):
    click(page, 20, 20)
    first = picture(page, "local")
    click(page, 100, 164)
    second = picture(page, "local")
    changed = np.abs(first - second).sum(-1) > 30
    rows, columns = np.nonzero(changed)
    inside = ((rows < 34) & (columns < 34)) | ((rows > 158) & (rows < 194) & (columns > 94) & (columns < 130))
    assert changed.any()
    assert inside.all()  # the two grids of 8×8 positions, 32×32 pixels each
    assert np.abs(first[60:150, 140:] - second[60:150, 140:]).sum() == 0


def test_stage_5_has_no_local_step_and_as_many_heads_as_the_model(page):
    page.locator("#explorer-block").select_option(label="stage 5, block 2")
    assert "no local step" in page.locator("#explorer-text").inner_text()
    assert page.locator("#explorer-head option").count() == 1 + 8
    page.locator("#explorer-head").select_option("7")
    assert "stage 5, position" in click(page, 10, 200)


def test_the_tables_are_on_the_page(page):
    assert page.locator("#tables table").count() == 1
    assert "hatnet_small" in page.locator("#tables table").inner_text()
    assert page.title() == "HAT-Net: analysis"
