"""The curves as matplotlib has drawn them, read from the SVG, whose text is text."""

import re
from xml.etree import ElementTree

import pytest

from hatnet_train.curves import INK, curves_svg


def row(epoch, **more):
    losses = {"train_loss": 2.0 / epoch, "eval_loss": 2.2 / epoch, "top1": 50.0 + epoch, "top5": 90.0}
    return {"epoch": epoch, **losses, **more}


def texts(svg):
    """All text of an SVG document, in order."""
    return ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg).findall(".//{*}text")]


def ticks(svg):
    """Numbers of the axes, by axis."""
    tree = ElementTree.fromstring(svg)
    return {
        axis: [
            "".join(text.itertext()).strip()
            for group in tree.findall(".//{*}g")
            if re.match(f"{axis}tick_", group.get("id", ""))
            for text in group.findall(".//{*}text")
        ]
        for axis in "xy"
    }


@pytest.mark.parametrize("epochs", [1, 2, 3, 7])
def test_epochs_are_integers_and_losses_plain_numbers(epochs):
    for svg in curves_svg([row(epoch) for epoch in range(1, epochs + 1)]):
        marks = ticks(svg)
        assert marks["x"]
        assert all(mark.isdigit() for mark in marks["x"])
        assert all(re.fullmatch(r"\d+(\.\d+)?", mark) for mark in marks["y"])


def test_losses_over_a_long_range_are_logarithmic_with_plain_labels():
    loss, _ = curves_svg([row(1), row(2, train_loss=0.002)])
    marks = [float(mark) for mark in ticks(loss)["y"] if mark]
    assert len(marks) >= 2
    assert marks[1] / marks[0] == pytest.approx(10)


def test_the_best_epoch_is_the_last_of_the_highest_top1():
    rows = [row(1), row(2, top1=88.5), row(3, top1=88.5), row(4)]
    _, accuracy = curves_svg(rows)
    assert "best: epoch 3, 88.50 %" in texts(accuracy)


@pytest.mark.parametrize(("classes", "shown"), [(10, False), (11, True)])
def test_top5_is_drawn_of_more_than_ten_classes(classes, shown):
    _, accuracy = curves_svg([row(1)], classes=classes)
    assert ("top-5" in texts(accuracy)) == shown


def test_text_has_the_colour_of_the_readers_theme():
    for svg in curves_svg([row(1)]):
        assert INK not in svg
        assert svg.count("currentColor") > 10
        assert "prefers-color-scheme" in svg
