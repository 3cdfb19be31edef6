"""Predictions of folders, patterns and standard input, as CSV, JSON lines and a page of pictures."""

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from hatnet_testing import error_line, raises
from hatnet_train.cli import predict
from hatnet_train.predict import find_images
from hatnet_train.prediction_files import write_predictions

ROWS = [
    {"image": f"{i}.png", "classes": ["a,b", "<c>"], "probabilities": [0.75 - i / 10, 0.25 + i / 10]} for i in range(3)
]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three pictures, a file that is none, and a folder below."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        Image.new("RGB", (300, 100 + i), (80 * i, 0, 0)).save(f"{i}.png")
    (tmp_path / "below").mkdir()
    Image.new("L", (9, 9)).save("below/deep.png")
    (tmp_path / "notes.txt").touch()
    return tmp_path


def written(path):
    """Rows of a CSV file or of JSON lines."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    head, *rows = csv.reader(io.StringIO(path.read_text()))
    assert head == ["image", "class1", "probability1", "class2", "probability2"]
    return [{"image": r[0], "classes": r[1::2], "probabilities": [*map(float, r[2::2])]} for r in rows]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_each_row_is_in_the_file_as_soon_as_it_comes(suffix, tmp_path):
    path, seen = tmp_path / f"rows{suffix}", []

    def rows():
        for row in ROWS:
            yield row
            seen.append(written(path))

    assert write_predictions(path, rows()) == 3
    assert seen == [ROWS[:1], ROWS[:2], ROWS]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".html"])
def test_a_file_is_left_alone_where_no_result_comes(suffix, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_text("earlier")

    def fails():
        raise ZeroDivisionError
        yield

    assert write_predictions(path, iter(())) == 0
    with pytest.raises(ZeroDivisionError):
        write_predictions(path, fails())
    assert path.read_text() == "earlier"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


class Page(HTMLParser):
    """Pictures and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.addresses, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        if tag == "img":
            data = base64.b64decode(given["src"].partition("base64,")[2])
            self.pictures.append((given["alt"], Image.open(io.BytesIO(data)).size))

    def handle_data(self, data):
        self.text += data


def test_a_page_shows_every_picture_small_and_needs_no_other_file(pictures):
    path = pictures / "page.html"
    assert write_predictions(path, iter(ROWS)) == 3
    page = Page(path.read_text())
    assert page.pictures == [(f"{i}.png", (192, round((100 + i) * 192 / 300))) for i in range(3)]
    assert all(address.startswith("data:") for address in page.addresses)
    assert page.text.count("<c>") == 3  # escaped
    assert "75.0 %" in page.text


def test_a_page_that_is_interrupted_does_not_replace_the_last_one(pictures):
    path = pictures / "page.html"
    path.write_text("earlier")

    def interrupted():
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_predictions(path, interrupted())
    assert path.read_text() == "earlier"


def test_a_pattern_stands_for_the_images_and_folders_that_match(pictures):
    found, skipped = find_images([pictures / "*"])
    assert [path.name for path in found] == ["0.png", "1.png", "2.png", "deep.png"]
    assert (skipped.files, skipped.first) == (1, str(pictures / "notes.txt"))
    found, _ = find_images([pictures / "**" / "[1d]*.png"])
    assert [path.name for path in found] == ["1.png", "deep.png"]
    with raises(ValueError, pictures / "*.gif"):
        find_images([pictures / "*.gif"])


def test_a_file_whose_name_is_like_a_pattern_is_itself(pictures):
    (pictures / "0.png").rename(pictures / "[0].png")
    assert find_images([pictures / "[0].png"])[0] == [pictures / "[0].png"]


@pytest.mark.parametrize("batch", ["1", "2", "32"])
def test_names_on_standard_input_are_read_in_batches_of_any_size(batch, checkpoint, pictures, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1.png\n\nbelow/deep.png\n"))
    out = pictures / "rows.jsonl"
    words = ["0.png", "-", "--checkpoint", str(checkpoint), "--batch", batch, "--size", "64", "--out", str(out)]
    assert predict([*words, "--precision", "bf16"]) == 0
    assert [row["image"] for row in written(out)] == ["0.png", "1.png", "below/deep.png"]
    assert re.findall(r"\d+", capsys.readouterr().out.replace(str(out), "")) == ["3"]


def test_size_and_precision_change_what_is_computed(checkpoint, pictures):
    rows = {}
    for words in ((), ("--size", "64"), ("--precision", "bf16")):
        assert predict(["1.png", "--checkpoint", str(checkpoint), "--top-k", "2", "--out", "a.csv", *words]) == 0
        ((rows[words]),) = written(pictures / "a.csv")
    plain, large, coarse = rows.values()
    assert plain["probabilities"] != large["probabilities"]
    assert plain["probabilities"] != coarse["probabilities"]
    assert coarse["probabilities"] == pytest.approx(plain["probabilities"], abs=0.02)


def test_empty_standard_input_is_an_error(checkpoint, pictures, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert predict(["-", "--checkpoint", str(checkpoint), "--out", "rows.csv"]) == 1
    error_line(capsys.readouterr().err, "hatnet-predict", "standard input")
    assert not (pictures / "rows.csv").exists()
