"""Complete deployables of hatnet-export: description, precision, accuracy on images, comparison of formats."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from hatnet_core import save_checkpoint
from hatnet_core.cli import main
from hatnet_core.export import open_export, read_description
from hatnet_core.export.compare import calibration, held_out
from hatnet_core.export.formats import FORMATS
from hatnet_core.preprocessing import Preprocessing
from hatnet_testing import error_line, raises, usage_error

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
PREPROCESSING = Preprocessing(tuple(CLASSES), image_size=32)
OPENVINO = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
NNCF = pytest.mark.skipif(importlib.util.find_spec("nncf") is None, reason="needs nncf")


def status(*arguments):
    """Exit status of the command, called in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def checkpoint(small_model, tmp_path):
    described = {name: value for name, value in PREPROCESSING.to_dict().items() if name != "resize"}
    save_checkpoint(small_model, tmp_path / "m.safetensors", {**described, "seed": 7})
    return tmp_path / "m.safetensors"


def draw(folder, model, count, wrong=0):
    """Images in the folder of the class that ``model`` finds, except ``wrong`` of them."""
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for i in range(count):
        noise = generator.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((40, 48), Image.Resampling.BICUBIC)
        image.save(folder / "image.png")
        with torch.no_grad():
            label = int(model(PREPROCESSING.open(folder / "image.png")[None]).argmax())
        (folder / "image.png").rename(folder / CLASSES[(label + (i < wrong)) % 5] / f"{i}.png")


@pytest.fixture
def photos(small_model, tmp_path):
    """Ten images to calibrate with, and eight held out, of which the model classifies six correctly."""
    draw(tmp_path / "photos/train", small_model, 10)
    draw(tmp_path / "photos/val", small_model, 8, wrong=2)
    return tmp_path / "photos"


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch.export.load of torch 2.10
@pytest.mark.parametrize("name", ["m.pt2", "m.onnx", "n.safetensors", pytest.param("m.xml", marks=OPENVINO)])
def test_a_file_contains_classes_preprocessing_and_metadata_and_a_json_with_them_is_next_to_it(
    name, checkpoint, tmp_path
):
    out = tmp_path / "out" / name
    out.parent.mkdir()
    assert status(checkpoint, *([] if "safe" in name else ["--static"]), "--out", out) == 0
    names = {name, f"{name}.json", "m.bin"} if name == "m.xml" else {name, f"{name}.json"}
    assert {path.name for path in out.parent.iterdir()} == names
    neighbour, inside = json.loads((out.parent / f"{name}.json").read_text()), read_description(out)
    for description in (neighbour, inside):
        assert Preprocessing(**{k: _tuple(description[k]) for k in vars(PREPROCESSING)}) == PREPROCESSING
        assert (description["seed"], description["config"]["num_classes"]) == (7, 5)
    assert neighbour["resize"] == 37
    assert neighbour["input"] == ([1, 3, 32, 32] if "safe" not in name else ["batch", 3, "height", "width"])


def _tuple(value):
    return tuple(value) if isinstance(value, list) else value


def test_the_top_1_on_the_images_is_printed_with_the_export(checkpoint, photos, tmp_path, capsys):
    assert status(checkpoint, "--static", "--data", photos, "--out", tmp_path / "m.pt2") == 0
    said = capsys.readouterr().out
    assert "75.00 % of 8 images" in said
    assert "100.00 %" in said


def test_a_folder_of_every_format_is_measured_on_the_images(checkpoint, photos, tmp_path, capsys, monkeypatch):
    compared = {name: FORMATS[name] for name in ("safetensors", "program", "onnx", "openvino")}
    monkeypatch.setattr("hatnet_core.export.deploy.FORMATS", compared)  # AOTInductor compiles for minutes
    assert status(checkpoint, "--static", "--compare", "--data", photos, "--out", tmp_path / "all") == 0
    rows = json.loads((tmp_path / "all/compare.json").read_text())
    assert [(row["format"], row["precision"]) for row in rows] == [(n, p) for n in compared for p in compared[n]]
    printed = capsys.readouterr().out
    for row in rows:
        assert any(line.startswith(f"{row['format']} {row['precision']} ") for line in printed.splitlines())
        if "skipped" in row:
            assert "hatnet-core[openvino]" in row["skipped"]
            continue
        file = tmp_path / "all" / row["file"]
        parts = [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]
        assert row["bytes"] == sum(part.stat().st_size for part in parts)
        assert (row["images"], row["images_per_second"] > 0) == (8, True)
        if row["precision"] != "int8":
            assert (row["top1"], row["agreement"]) == (75.0, 100.0)
            assert row["largest_difference"] < (1e-4 if row["precision"] == "fp32" else 0.02)
        else:
            assert row["largest_difference"] > 1e-4
    sizes = {(row["format"], row["precision"]): row.get("bytes") for row in rows}
    assert sizes["onnx", "fp16"] < sizes["onnx", "fp32"]


@pytest.mark.parametrize("name", ["m.onnx", pytest.param("m.xml", marks=[OPENVINO, NNCF])])
def test_an_int8_file_keeps_its_description_and_is_close_to_the_model(name, checkpoint, photos, small_model, tmp_path):
    out = tmp_path / name
    arguments = ["--static", "--precision", "int8", "--data", photos, "--calibration", 6]
    assert status(checkpoint, *arguments, "--out", out) == 0
    assert read_description(out)["classes"] == CLASSES
    (images,) = calibration(photos, CLASSES, 6).batches(PREPROCESSING, 6)
    run = open_export(out)
    with torch.no_grad():
        expected = small_model(images)
    found = torch.cat([run(image[None]) for image in images])
    assert 1e-4 < ((found - expected).norm() / expected.norm()).item() < 0.2


def test_an_fp16_graph_takes_and_gives_fp32_and_the_opset_asked_for(checkpoint, small_model, tmp_path):
    import onnx

    arguments = ["--static", "--precision", "fp16", "--opset", 19]
    assert status(checkpoint, *arguments, "--out", tmp_path / "m.onnx") == 0
    graph = onnx.load(tmp_path / "m.onnx")
    assert {one.version for one in graph.opset_import if one.domain == ""} == {19}
    assert {one.data_type for one in graph.graph.initializer} >= {onnx.TensorProto.FLOAT16}
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(open_export(tmp_path / "m.onnx")(image), small_model(image), rtol=0.02, atol=0.02)
    assert read_description(tmp_path / "m.onnx")["seed"] == 7


@pytest.mark.slow  # a C++ compiler runs for minutes
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_a_compiled_package_agrees_with_the_model_and_keeps_its_description(checkpoint, small_model, tmp_path):
    out = tmp_path / "m.pt2"
    assert status(checkpoint, "--to", "aotinductor", "--static", "--out", out) == 0
    assert read_description(out, "aotinductor")["classes"] == CLASSES
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(open_export(out, "aotinductor")(image), small_model(image), rtol=1e-4, atol=1e-4)


def test_preprocessing_is_that_of_torchvision(tmp_path):
    from torchvision.transforms import v2

    pixels = torch.randint(256, (3, 90, 90), dtype=torch.uint8)
    transform = v2.Compose([
        v2.Resize(37, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(32),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
    ])  # fmt: skip
    torch.testing.assert_close(PREPROCESSING(pixels), transform(pixels), rtol=0, atol=0.02)


def test_calibration_images_are_spread_over_the_classes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / f"{i}.png")
    assert calibration(tmp_path, ["a", "b"], 4).labels.tolist() == [0, 0, 1, 1]
    assert len(calibration(tmp_path, ["a", "b"], 100).files) == 12


def test_folders_that_do_not_fit_the_classes_are_refused(tmp_path):
    with raises(ValueError, tmp_path, "val"):
        held_out(tmp_path, ["a"])
    (tmp_path / "val/a").mkdir(parents=True)
    with raises(ValueError, tmp_path / "val", "'a'"):
        held_out(tmp_path, ["a"])
    (tmp_path / "val/b").mkdir()
    with raises(ValueError, tmp_path / "val", "'b'"):
        held_out(tmp_path, ["a"])


WRONG = [
    ("--compare --out all", ["--compare", "--data"]),
    ("--compare --data photos --to onnx --out all", ["--compare", "--to", "onnx"]),
    ("--precision int8 --out m.onnx", ["--data", "int8"]),
    ("--precision fp16 --out m.pt2", ["--precision", "m.pt2"]),
    ("--opset 19 --out m.xml", ["--opset", "m.xml"]),
    ("--opset 9 --out m.onnx", ["--opset", 9, 18]),
    ("--to onnx --out m.pt2", ["--out", "m.pt2", ".onnx"]),
    ("--to tensorrt --out m.pt2", ["--to", "tensorrt"]),
    ("--checkpoint m.safetensors --out m.pt2", ["--checkpoint", "m.safetensors"]),
]


@pytest.mark.parametrize(("line", "named"), WRONG)
def test_options_that_do_not_go_together_are_a_usage_error(line, named, checkpoint, monkeypatch, capsys):
    monkeypatch.chdir(checkpoint.parent)
    assert status(checkpoint.name, *line.split()) == 2
    usage_error(capsys.readouterr().err, *named)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_a_runtime_that_is_not_installed_is_one_line_with_the_way_to_get_it(checkpoint, monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
    assert status(checkpoint, "--static", "--out", tmp_path / "m.xml") == 1
    error_line(capsys.readouterr().err, "hatnet-export", "openvino", "hatnet-core[openvino]")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_a_broken_image_is_one_line_and_no_file(checkpoint, photos, tmp_path, capsys):
    (photos / "val/ant/x.png").write_bytes(b"broken")
    assert status(checkpoint, "--static", "--data", photos, "--out", tmp_path / "m.pt2") == 1
    error_line(capsys.readouterr().err, "hatnet-export", photos / "val/ant/x.png")
    assert not (tmp_path / "m.pt2").exists()
