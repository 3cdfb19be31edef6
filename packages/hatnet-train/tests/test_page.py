"""The page without a browser: one file with the numbers, the pictures and the commands."""

import base64
import html
import io
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from hatnet_train.config import TrainConfig
from hatnet_train.page import MATRIX_CLASSES, PICTURES, THUMBNAIL, imagenet_synsets, run_page, write_page
from hatnet_train.recipes import build_config
from hatnet_train.results import Results


class Drawn:
    """Images of one grey each, the number of the image; image 3 can no longer be read."""

    def __init__(self, classes, labels, size=(300, 200)):
        self.classes, self.labels, self.size = tuple(classes), np.asarray(labels), size

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        if i == 3:
            raise ValueError("gone")
        return torch.full((3, self.size[1], self.size[0]), i, dtype=torch.uint8)

    def name(self, i):
        return f"photos/val/{self.classes[self.labels[i]]}/{i}.jpg"

    def digest(self):
        return ""


def rows(epochs=2):
    values = {"train_loss": 1.0, "eval_loss": 0.9, "top1": 50.0, "top5": 100.0}
    return [{"epoch": epoch + 1, **values} for epoch in range(epochs)]


def written(folder, classes=("ant", "bee"), *, labels=None, out="runs/insects", **more):
    """A page about images of these classes, each second one taken for the next class; its text and its source."""
    labels = np.arange(40) % len(classes) if labels is None else np.asarray(labels)
    predictions = (labels + np.arange(len(labels)) % 2) % len(classes)
    probabilities = np.linspace(0.2, 0.9, len(labels))
    source = Drawn(classes, labels, **more)
    results = Results(source.classes, np.arange(len(labels)), labels, predictions, probabilities)
    config = build_config("digits", {"data": "photos"})
    assert isinstance(config, TrainConfig)
    write_page(run_page(out, config, 123, source, results, rows()), folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8"), source


def section(page, name):
    return re.search(f'<section id="{name}">(.*?)</section>', page, re.DOTALL)[1]


def cells(row):
    return [
        html.unescape(re.sub("<[^>]+>", "", cell)).strip() for cell in re.findall("<t[dh].*?</t[dh]>", row, re.DOTALL)
    ]


def table(text):
    return [cells(row) for row in re.findall("<tr>.*?</tr>", text, re.DOTALL)]


def test_the_matrix_and_the_table_hold_every_image(tmp_path):
    page, _ = written(tmp_path, ("ant", "bee", "cow"), labels=[0, 0, 0, 1, 1, 2])
    _, *matrix = table(section(page, "confusions").partition("Most frequent")[0])
    # every second one is taken for the next class
    assert matrix == [["ant", "2", "1", "0"], ["bee", "0", "1", "1"], ["cow", "1", "0", "0"]]
    _, *classes = table(section(page, "classes"))
    assert classes[0] == ["ant", "66.7 %", "3", "2", "3", "bee (1)"]
    assert classes[2] == ["cow", "0.0 %", "1", "0", "1", "ant (1)"]


def test_pictures_are_embedded_reduced_and_named(tmp_path):
    page, source = written(tmp_path, size=(3 * THUMBNAIL, 2 * THUMBNAIL))
    figures = re.findall("<figure>(.*?)</figure>", section(page, "pictures"), re.DOTALL)
    assert len(figures) == 2 * PICTURES
    greys = []
    for figure in figures:
        if "cannot be read" in figure:
            continue
        picture = Image.open(io.BytesIO(base64.b64decode(re.search('src="data:image/jpeg;base64,([^"]+)', figure)[1])))
        assert picture.size == (THUMBNAIL, THUMBNAIL * 2 // 3)
        i = int(re.search(r"(\d+)\.jpg", figure)[1])
        assert np.asarray(picture).mean() == pytest.approx(i, abs=2)
        assert source.name(i) in figure
        greys.append(i)
    assert greys[:3] == [39, 37, 35]  # the most confident mistakes
    assert "cannot be read" in "".join(figures[:PICTURES]) or 3 not in greys


def test_many_classes_are_drawn_and_their_confusions_listed(tmp_path):
    classes = [f"class {i}" for i in range(MATRIX_CLASSES + 5)]
    page, _ = written(tmp_path, classes, labels=np.arange(60) % len(classes))
    confusions = section(page, "confusions")
    encoded = re.search('src="data:image/png;base64,([^"]+)', confusions)[1]
    opacity = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))[..., 3]
    assert opacity.shape == (len(classes), len(classes))
    assert opacity[0, 0] == opacity[1, 2] == 255  # all images of a row
    assert (opacity > 0).sum() == len(classes)
    assert ["class 1", "class 2", "2", "2"] in table(confusions)


def test_classes_without_images_are_named_and_not_counted(tmp_path):
    page, _ = written(tmp_path, ("ant", "bee", "cow", "dog"), labels=[0, 0, 1, 1])
    classes = section(page, "classes")
    assert "dog" in classes
    assert "dog" not in [row[0] for row in table(classes)]
    assert "50.00 %" in page  # mean of the two classes


def test_names_are_text_in_the_page(tmp_path):
    page, _ = written(tmp_path, ("<script>alert(1)</script>", "a&b\"'"), out="runs/<b>x")
    assert "<script>alert" not in page
    assert "<b>x" not in page
    assert "&lt;script&gt;" in page


def test_commands_are_one_line_each_that_a_shell_reads(tmp_path):
    page, _ = written(tmp_path, out="runs/my insects")
    commands = [html.unescape(line) for line in re.findall("<code>(.*?)</code>", section(page, "next"))]
    words = [shlex.split(command) for command in commands]
    assert {line[0] for line in words} >= {"hatnet-predict", "hatnet-eval", "hatnet-export", "hatnet-analysis"}
    assert all("runs/my insects" in line for line in words)


def test_the_page_loads_nothing(tmp_path):
    page, _ = written(tmp_path)
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "url(" not in page


def test_top5_is_shown_of_more_than_ten_classes(tmp_path):
    few, _ = written(tmp_path)
    many, _ = written(tmp_path, [f"class {i}" for i in range(11)])
    assert ("top-5" in few, "top-5" in many) == (False, True)


def test_imagenets_classes_are_shown_with_words(tmp_path):
    synsets = [*imagenet_synsets()]
    assert (len(synsets), synsets[0]) == (1000, "n01440764")
    page, _ = written(tmp_path, synsets[:2])
    assert "tench (n01440764)" in page
