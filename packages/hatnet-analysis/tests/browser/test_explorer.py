"""The report in headless Chromium: opened, clicked, read; ``nox -s browser`` runs this, and nothing else does."""

import base64
import io
import os
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

from hatnet_analysis.attention_input import to_input
from hatnet_analysis.attention_maps import look, record_weights
from hatnet_analysis.report import write_report
from hatnet_core import create_model, save_checkpoint
from hatnet_testing import check

CHROMIUM = os.environ["CHROMIUM"]

WIDTH, HEIGHT = 448, 224
"""Of the image in pixels; the model sees it as 224×224, so that a position of stage 2 is 8 pixels wide and 4 high."""

BRIGHT = (200, 164)
"""x and y of a white spot in the image, at row 41 and column 25 of stage 2."""


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    """An image with one white spot, and a model whose every query in stage 2 asks for brightness; else random."""
    torch.manual_seed(0)
    model = create_model("hatnet_tiny", num_classes=3).eval()
    with torch.no_grad():
        for convolution in (model.stem.conv1, model.stem.conv2):
            convolution.weight[0].zero_()
            convolution.bias[0].zero_()
            convolution.weight[0, : 3 if convolution is model.stem.conv1 else 1] = 0.1  # brightness, in channel 0
        attention = model.stages[0].blocks[0].attn
        for convolution in (attention.qkv, attention.q, attention.kv):
            convolution.weight.zero_()
            convolution.bias.zero_()
        attention.qkv.bias[0] = attention.q.bias[0] = 30
        attention.qkv.weight[48, 0] = attention.kv.weight[0, 0] = 1
    image = Image.new("RGB", (WIDTH, HEIGHT), "black")
    ImageDraw.Draw(image).ellipse([BRIGHT[0] - 10, BRIGHT[1] - 5, BRIGHT[0] + 10, BRIGHT[1] + 5], fill="white")
    return model, image


def written(model, image, folder, sections):
    """A report on that image and that model."""
    save_checkpoint(model, folder / "model.safetensors")
    image.save(folder / "image.png")
    return write_report(folder / "out", sections, ["1"], folder / "image.png", folder / "model.safetensors")


@pytest.fixture(scope="module")
def page_file(explored, tmp_path_factory):
    return written(*explored, tmp_path_factory.mktemp("report"), ["tables", "attention"])


@pytest.fixture
def page(page_file):
    with opened(page_file) as tab:
        yield tab


@contextmanager
def opened(page_file, width=1250, scheme="light"):
    """The open page; an error on its console, or a request for anything but itself, fails the test."""
    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
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
    """Click on a pixel of the image; what the page says then."""
    box = page.locator("#explorer-image").bounding_box()
    place = {"x": x / WIDTH * box["width"], "y": y / HEIGHT * box["height"]}
    page.locator("#explorer-image").click(position=place)
    return page.locator("#explorer-text").inner_text()


def screenshot(page, name):
    """A canvas as the browser shows it, as [HEIGHT, WIDTH, 3]; its edges lie between pixels of the screen."""
    taken = Image.open(io.BytesIO(page.locator(f"#explorer-{name}").screenshot()))
    return np.asarray(taken.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)).astype(int)


def picture(page, name):
    """Pixels of a canvas, as [HEIGHT, WIDTH, 3]."""
    url = page.locator(f"#explorer-{name}").evaluate("canvas => canvas.toDataURL()")
    drawn = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    assert drawn.size == (WIDTH, HEIGHT)
    return np.asarray(drawn).astype(int)


def likeness(painted, weights):
    """Correlation of the brightness of a picture with a map of weights, taken in the middle of each cell."""
    rows = ((np.arange(weights.shape[0]) + 0.5) * HEIGHT / weights.shape[0]).astype(int)
    columns = ((np.arange(weights.shape[1]) + 0.5) * WIDTH / weights.shape[1]).astype(int)
    brightness = painted.sum(-1)[np.ix_(rows, columns)]
    return np.corrcoef(brightness.flatten(), np.asarray(weights).flatten())[0, 1]


def test_the_image_is_shown_in_its_own_aspect_ratio(page):
    for name in ("image", "local", "global", "rollout"):
        box = page.locator(f"#explorer-{name}").bounding_box()
        assert box["width"] / box["height"] == pytest.approx(WIDTH / HEIGHT, rel=0.01)


def test_a_click_shows_the_grid_and_the_pooled_position_that_the_weights_point_at(page):
    text = click(page, 180, 150)
    # the strongest pooled position, last, is that of the spot at row 41, column 25 of the map
    check(text, "stage 2", "pooled", "(37, 22)", "56×56", "(32, 16)", "(40, 24)")
    pooled = screenshot(page, "global")
    cell = pooled[162:190, 196:252].mean((0, 1))  # rows 40-47 and columns 24-31 of the map, in pixels
    elsewhere = pooled[20:40, 40:80].mean((0, 1))
    assert cell[0] > 150 > 60 > elsewhere[0]  # yellow, and black


def test_the_local_map_is_painted_in_the_grid_of_the_point_alone(page):
    click(page, 40, 20)
    first = picture(page, "local")
    click(page, 224, 176)
    second = picture(page, "local")
    changed = np.abs(first - second).sum(-1) > 30
    rows, columns = np.nonzero(changed)
    inside = ((rows < 32) & (columns < 64)) | ((rows >= 160) & (rows < 192) & (columns >= 192) & (columns < 256))
    assert changed.any()
    assert inside.all()  # the two grids of 8×8 positions, 64×32 pixels each


def weights_of(model, image):
    return record_weights(model, to_input(image, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def test_rollout_is_that_of_the_point_clicked(tmp_path):
    torch.manual_seed(0)
    model, image = create_model("hatnet_tiny", num_classes=3).eval(), Image.new("RGB", (WIDTH, HEIGHT), "black")
    points = [(40, 20), (420, 20), (230, 200)]
    expected = [look(weights_of(model, image), image, point, stage=2).rollout for point in points]
    with opened(written(model, image, tmp_path, ["attention"])) as page:
        for i, point in enumerate(points):
            click(page, *point)
            like = [likeness(picture(page, "rollout"), shares) for shares in expected]
            assert np.argmax(like) == i
            assert like[i] > 0.9


def test_the_head_that_is_chosen_is_the_one_that_is_drawn(page, explored):
    model, image = explored
    recorded = weights_of(model, image)
    page.locator("#explorer-block").select_option(label="stage 4, block 3")
    click(page, 100, 100)
    assert page.locator("#explorer-head option").all_inner_texts() == ["mean of all", "0", "1", "2", "3", "4"]
    for choice, head in (("mean", None), ("1", 1), ("4", 4)):
        page.locator("#explorer-head").select_option(choice)
        painted = picture(page, "global")
        like = {
            other: likeness(painted, look(recorded, image, (100, 100), 4, 3, other).attention.global_)
            for other in (None, 0, 1, 2, 3, 4)
        }
        assert max(like, key=like.get) == head
        assert like[head] > 0.9


@pytest.mark.parametrize(
    ("x", "y", "position"),
    [
        (0, 0, (0, 0)),
        (WIDTH - 1, 0, (0, 55)),
        (0, HEIGHT - 1, (55, 0)),
        (WIDTH - 1, HEIGHT - 1, (55, 55)),
        (WIDTH / 2, HEIGHT - 1, (55, 28)),
    ],
)
def test_a_click_at_the_edge_is_the_position_there(page, x, y, position):
    check(click(page, x, y), "stage 2", position, "56×56")


def test_a_mouse_beside_the_edge_is_taken_as_on_it(page):
    box = page.locator("#explorer-image").bounding_box()
    for x, y, position in ((-1, -1, (0, 0)), (box["width"] + 1, box["height"] + 1, (55, 55))):
        event = {"clientX": box["x"] + x, "clientY": box["y"] + y}
        page.locator("#explorer-image").dispatch_event("click", event)
        check(page.locator("#explorer-text").inner_text(), position)


def test_stage_5_has_no_local_step_and_as_many_heads_as_the_model(page):
    page.locator("#explorer-block").select_option(label="stage 5, block 2")
    text = page.locator("#explorer-text").inner_text()
    check(text, "stage 5")
    assert "pooled" not in text
    assert page.locator("#explorer-head option").count() == 1 + 8
    page.locator("#explorer-head").select_option("7")
    check(click(page, 20, 200), "stage 5")


def test_the_tables_are_on_the_page(page):
    assert page.locator("#tables table").count() == 1
    assert "hatnet_small" in page.locator("#tables table").inner_text()
    assert page.title() == "HAT-Net: analysis"


def test_keys_move_the_point_and_choose_block_and_head(page):
    click(page, 180, 150)
    scrolled = page.evaluate("window.scrollY")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    check(page.locator("#explorer-text").inner_text(), "stage 2", (36, 23))
    for _ in range(60):
        page.keyboard.press("ArrowLeft")
    check(page.locator("#explorer-text").inner_text(), (36, 0))
    page.keyboard.press("PageDown")
    check(page.locator("#explorer-text").inner_text(), "stage 2", (36, 0))
    assert page.locator("#explorer-block").input_value() == "1"
    page.keyboard.press("]")
    assert page.locator("#explorer-head").input_value() == "0"
    page.keyboard.press("[")
    page.keyboard.press("PageUp")
    assert page.locator("#explorer-head").input_value() == "mean"
    assert page.locator("#explorer-block").input_value() == "0"
    assert page.evaluate("window.scrollY") == scrolled


def test_a_click_on_a_map_moves_the_point_as_one_on_the_image(page):
    text = click(page, 180, 150)
    click(page, 20, 20)
    box = page.locator("#explorer-rollout").bounding_box()
    place = {"x": 180 / WIDTH * box["width"], "y": 150 / HEIGHT * box["height"]}
    page.locator("#explorer-rollout").click(position=place)
    assert page.locator("#explorer-text").inner_text() == text


def test_the_bar_under_a_map_names_its_smallest_and_its_largest_weight(page, explored):
    model, image = explored
    page.locator("#explorer-block").select_option(label="stage 4, block 3")
    click(page, 100, 100)
    at = look(weights_of(model, image), image, (100, 100), 4, 3, None).attention
    for name, weights in (("local", at.local), ("global", at.global_)):
        low, high = (float(page.locator(f"#explorer-{name}-{end}").inner_text()) for end in ("low", "high"))
        assert low < high
        assert (low, high) == pytest.approx((weights.min().item(), weights.max().item()), rel=0.02)


@pytest.mark.parametrize("width", [1250, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_explorer_fits_every_screen_with_its_controls_in_one_row(page_file, width, scheme):
    with opened(page_file, width, scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = [page.locator(f"#explorer-{name}").bounding_box() for name in ("block", "head")]
        assert boxes[0]["y"] == pytest.approx(boxes[1]["y"], abs=2)
        assert all(box["x"] + box["width"] <= width for box in boxes)
        assert page.locator("#explorer-image").bounding_box()["width"] >= min(width - 60, 500)


def test_random_weights_are_named_and_those_of_a_checkpoint_are_not(tmp_path, page_file):
    with opened(page_file) as trained:
        assert trained.get_by_role("note").count() == 0
        assert "random weights" not in trained.locator("#attention").inner_text()
    with opened(write_report(tmp_path, ["attention"])) as untrained:
        check(untrained.get_by_role("note").inner_text(), "Random", "hatnet_tiny", "untrained")
        assert untrained.locator("#attention").inner_text().count("(random weights)") == 3
