"""The page without a browser: one file, whole or absent, that holds what the command measured."""

import base64
import html
import io
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hatnet_analysis.attention_input import to_input
from hatnet_analysis.attention_maps import record_weights, rollout
from hatnet_analysis.growth import CONTENDERS, growth
from hatnet_analysis.report import SIZE, _rows, write_report
from hatnet_analysis.tables import SECTIONS, TABLES
from hatnet_analysis.throughput import COMPARED, SpeedRow
from hatnet_core import create_model, save_checkpoint
from hatnet_testing import raises


def decoded(packed, size):
    values = np.frombuffer(base64.b64decode(packed["values"]), np.uint8).reshape(-1, size) / 255
    low, high = np.frombuffer(base64.b64decode(packed["ranges"]), np.float32).reshape(-1, 2).T
    return torch.tensor(low[:, None] + (high - low)[:, None] * values)


def test_rows_keep_their_values_to_a_part_in_510_of_their_range():
    torch.manual_seed(0)
    values = torch.rand(5, 7, 9)
    error = (decoded(_rows(values), 9) - values.reshape(-1, 9)).abs().amax(-1)
    spans = values.reshape(-1, 9).amax(-1) - values.reshape(-1, 9).amin(-1)
    assert (error <= spans / 509).all()
    assert (decoded(_rows(torch.full((2, 4), 0.25)), 4) == 0.25).all()


def test_the_positions_of_every_map_divide_the_explorers_image_evenly():
    assert SIZE % 32 == 0  # the page takes it so


def test_a_checkpoints_name_is_text_in_the_page(tmp_path):
    name = "{{ titles }}<b>&.safetensors"
    save_checkpoint(create_model("hatnet_tiny", num_classes=3), tmp_path / name)
    page = write_report(tmp_path, ["attention"], checkpoint=tmp_path / name).read_text(encoding="utf-8")
    assert html.escape(name) in page
    assert "<b>" not in page


def test_the_explorer_holds_the_weights_of_every_block_of_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = create_model("hatnet_tiny", num_classes=3)
    save_checkpoint(model, tmp_path / "model.safetensors", {"mean": [0.5] * 3, "std": [0.5] * 3})
    Image.linear_gradient("L").resize((90, 60)).convert("RGB").save(tmp_path / "image.png")
    path = write_report(
        tmp_path / "out",
        ["attention"],
        image=tmp_path / "image.png",
        checkpoint=tmp_path / "model.safetensors",
    )
    assert path == tmp_path / "out" / "index.html"
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    page = path.read_text(encoding="utf-8")
    assert "{{" not in page
    assert not re.search(r"""(src|href)=["'](?!data:|\#)""", page)  # nothing to load
    assert "12.3 M" in page
    assert "model.safetensors" in page
    data = json.loads(re.search(r'id="explorer-data">(.*?)</script>', page, re.DOTALL)[1])
    with Image.open(io.BytesIO(base64.b64decode(data["image"].partition(",")[2]))) as shown:
        assert shown.size == (448, 299)  # as 90 to 60
    with Image.open(tmp_path / "image.png") as image:
        recorded = record_weights(model, to_input(image, (224, 224), [0.5] * 3, [0.5] * 3))
    blocks = [weights for stage in recorded for weights in stage]
    assert [(block["stage"], block["block"]) for block in data["blocks"]] == [
        (stage + 2, i) for stage, number in enumerate((2, 2, 6, 3)) for i in range(number)
    ]
    for packed, weights in zip(data["blocks"], blocks, strict=True):
        size = weights.global_.shape[-1]
        torch.testing.assert_close(
            decoded(packed["global"], size), weights.global_.reshape(-1, size).double(), atol=1e-3, rtol=0
        )
        assert (packed["local"] is None) == (weights.local is None)
    shares = decoded(data["rollout"]["shares"], 56 * 56)
    torch.testing.assert_close(shares[7 * 3 + 2], rollout(recorded, (3, 2)).flatten().double(), atol=1e-3, rtol=0)


def test_tables_stand_in_the_page_with_their_verdicts(tmp_path):
    page = write_report(tmp_path, ["tables"], tables=["1"]).read_text(encoding="utf-8")
    assert page.count("<table>") == 1
    for words in ("hatnet_large", "63.11", "equal", "C320 K3 E4 ×27", "Table 1"):
        assert words in page


def tables_of(page):
    """Each table of a page as rows of the texts of their cells, the headings first."""
    tables = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in tables]
    cells = re.compile(r"<t[hd][^>]*>(.*?)</t[hd]>")
    return [[[html.unescape(cell).strip() for cell in cells.findall(row)] for row in table] for table in rows]


def plot_of(page):
    (plot,) = re.findall(r'<img class="figure"[^>]* src="data:image/png;base64,([^"]*)">', page)
    return Image.open(io.BytesIO(base64.b64decode(plot)))


def test_growth_stands_in_the_page_as_a_plot_and_three_tables(tmp_path, monkeypatch):
    rows = growth((64, 128), rounds=1)
    for i, row in enumerate(rows):
        row.seconds_fused = i + 1.2345
    monkeypatch.setattr("hatnet_analysis.report.growth", lambda **arguments: rows)
    page = write_report(tmp_path, ["complexity"]).read_text(encoding="utf-8")
    points, powers, crossings = tables_of(page)
    assert [row[:2] for row in points[1:]] == [[c.name, side] for c in CONTENDERS for side in ("64", "128")]
    times = points[0].index("time, fused (s)")
    assert [row[times] for row in points[1:]] == [f"{i + 1.2345:.4f}" for i in range(2 * len(CONTENDERS))]
    assert [row[0] for row in powers[1:]] == [contender.name for contender in CONTENDERS]
    assert powers[1][powers[0].index("time, fused")] == "0.43"  # 4 times the positions, 2.2345 / 1.2345 the time
    assert crossings[0][:4] == ["slower", "faster", "quantity", "from this side on (pixels)"]
    assert ["MHSA", "H-MHSA", "macs"] in [row[:3] for row in crossings[1:]]
    plot = plot_of(page)
    assert plot.size == (13 * 110, 10 * 110)
    assert plot.convert("RGB").getcolors(100) is None  # more colours than that


def test_speed_stands_in_the_page_as_a_plot_and_a_table(tmp_path, monkeypatch):
    asked = []

    def measure(names, settings, progress):
        asked.append((tuple(names), settings.device))
        return [
            SpeedRow(**dict.fromkeys(SpeedRow.__dataclass_fields__) | {"model": name, "images_per_second": i + 10.5})
            for i, name in enumerate(names)
        ]

    monkeypatch.setattr("hatnet_analysis.throughput.measure_throughput", measure)
    monkeypatch.setattr("hatnet_analysis.throughput.load_model", lambda name, size: name)
    flops = SimpleNamespace(total=SimpleNamespace(paper=3 * 10**9, complete=4 * 10**9))
    monkeypatch.setattr("hatnet_analysis.throughput.count_flops", lambda model, height, width: flops)
    page = write_report(tmp_path, ["compare"]).read_text(encoding="utf-8")
    assert asked == [(COMPARED, "cpu")]
    ((headings, *rows),) = tables_of(page)
    assert headings == ["model", "images/s", "FLOPs, paper (G)", "FLOPs, complete (G)", "top-1, the papers' (%)"]
    assert [row[:4] for row in rows] == [[name, f"{i + 10.5}", "3.00", "4.00"] for i, name in enumerate(COMPARED)]
    assert rows[COMPARED.index("hatnet_small")][4] == "82.6"  # Table 2
    plot = plot_of(page)
    assert plot.size == (12 * 110, 528)  # 4.8 inches
    assert plot.convert("RGB").getcolors(100) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"sections": ["prices"]}, ("section", "'prices'", *SECTIONS)),
        ({"tables": ["5"]}, ("table", "'5'", *TABLES)),
        ({"device": "cuda:99"}, ("device", "'cuda:99'")),
        ({"sections": ["attention"], "variant": "hatnet_huge"}, ("'hatnet_huge'", "hatnet_tiny")),
    ],
)
def test_what_is_refused_leaves_no_folder(arguments, named, tmp_path):
    with raises(ValueError, *named):
        write_report(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "absent", "named"),
    [
        (["tables"], "timm", ("table 2", "timm", "hatnet-analysis[timm]")),
        (["tables"], "hatnet_dense", ("table 2", "hatnet-dense", "hatnet-analysis[dense]")),
        (["compare"], "timm", ("timm/resnet50", "hatnet-analysis[timm]")),
    ],
)
def test_a_library_that_is_not_installed_is_named_before_any_measurement(
    sections, absent, named, tmp_path, measured, monkeypatch
):
    monkeypatch.setattr("hatnet_analysis.paper.find_spec", lambda name: None if name == absent else object())
    monkeypatch.setitem(sys.modules, absent, None)
    with raises(ImportError, *named):
        write_report(tmp_path / "page", sections)
    assert measured == []
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize("name", ["file", "file/below", "new/" + "long" * 100])
def test_a_folder_that_cannot_be_one_is_refused_before_any_measurement(name, tmp_path, measured):
    (tmp_path / "file").touch()
    with raises(ValueError, tmp_path / name):
        write_report(tmp_path / name, ["tables"])
    assert measured == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_page_that_would_replace_a_folder_is_refused_before_any_measurement(tmp_path, measured):
    (tmp_path / "index.html").mkdir()
    with raises(ValueError, tmp_path / "index.html"):
        write_report(tmp_path, ["tables"])
    assert measured == []
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


@pytest.fixture
def measured(monkeypatch):
    """Tables whose measurement was begun; it fails."""
    begun = []

    def fails(table, *arguments):
        begun.append(table)
        raise ValueError("no such model")

    monkeypatch.setattr("hatnet_analysis.report.table_rows", fails)
    return begun


def test_a_measurement_that_fails_leaves_what_was_there_before(tmp_path, measured):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "index.html").write_text("of last week")
    for out in ("new", "new/below", "old", "old/new"):
        with raises(ValueError, "no such model"):
            write_report(tmp_path / out, ["tables"])
    assert measured == ["1"] * 4
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "old", tmp_path / "old" / "index.html"]
    assert (tmp_path / "old" / "index.html").read_text() == "of last week"
