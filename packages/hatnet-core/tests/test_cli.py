"""The command hatnet-export."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hatnet_core import create_model, read_metadata, save_checkpoint
from hatnet_core.cli import main
from hatnet_core.export import largest_difference
from hatnet_testing import check, error_line, usage_error

pytestmark = pytest.mark.long

BIN = Path(sys.executable).parent


def status(arguments):
    """Exit status of the command, called in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("name", ["m.pt2", "m.onnx", "m.safetensors"])
def test_the_command_exports_a_checkpoint_and_says_how_far_it_is_from_the_model(name, small_model, tmp_path, capsys):
    save_checkpoint(small_model, tmp_path / "weights.safetensors")
    weights = tmp_path / "weights.safetensors"
    size = [] if name.endswith(".safetensors") else ["--size", "64", "96"]
    assert status(["--checkpoint", weights, *size, "--out", tmp_path / name]) == 0
    said = capsys.readouterr().out
    check(said, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({name, f"{name}.json", "weights.safetensors"})
    if name.endswith(".safetensors"):
        assert read_metadata(tmp_path / name)["config"] == read_metadata(weights)["config"]
    else:
        assert float(re.search(r"\d\.\de-\d\d", said)[0]) < 1e-4
        check(said, "2×3×96×192")
        assert largest_difference(small_model, tmp_path / name, [(2, 75, 81)]) < 1e-4


def test_the_command_takes_a_foreign_checkpoint_with_the_name_of_its_model(tmp_path):
    model = create_model("hatnet_tiny", num_classes=3, in_chans=4)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "t.pth")
    out = tmp_path / "t.safetensors"
    assert status(["--checkpoint", tmp_path / "t.pth", "--variant", "hatnet_tiny", "--out", out]) == 0
    config = read_metadata(out)["config"]
    assert (config["num_classes"], config["in_chans"]) == (3, 4)


def test_a_checkpoint_is_traced_at_the_size_it_was_trained_with(small_model, tmp_path, capsys):
    save_checkpoint(small_model, tmp_path / "m.safetensors", {"image_size": 64, "classes": list("abcde")})
    assert status(["--checkpoint", tmp_path / "m.safetensors", "--static", "--out", tmp_path / "m.pt2"]) == 0
    check(capsys.readouterr().out, "1×3×64×64")


def test_a_run_at_32_pixels_is_exported_with_the_defaults_and_runs_at_32_pixels(small_model, tmp_path, capsys):
    save_checkpoint(small_model, tmp_path / "model.safetensors", {"image_size": 32})
    assert status(["--checkpoint", tmp_path, "--out", tmp_path / "m.pt2"]) == 0
    check(capsys.readouterr().out, "1×3×32×32", "2×3×64×128")
    assert largest_difference(small_model, tmp_path / "m.pt2", [(1, 32, 32), (2, 75, 81)]) < 1e-4


def test_another_set_of_weights_of_a_file_is_exported_by_its_key(tmp_path):
    model = create_model("hatnet_tiny", num_classes=3)
    average = {name: torch.full_like(t, 0.5) for name, t in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": average}, tmp_path / "t.pth")
    out = tmp_path / "t.safetensors"
    arguments = ["--checkpoint", tmp_path / "t.pth", "--variant", "hatnet_tiny", "--key", "model_ema", "--out", out]
    assert status(arguments) == 0
    assert (load_file(out)["head.bias"] == 0.5).all()


@pytest.mark.parametrize("side", [31, 4097, 64.0, "64", None])
def test_a_checkpoint_of_no_usable_size_is_refused_by_name(side, small_model, tmp_path, capsys):
    save_checkpoint(small_model, tmp_path / "m.safetensors", {"image_size": side})
    assert status(["--checkpoint", tmp_path / "m.safetensors", "--out", tmp_path / "m.pt2"]) == 1
    error_line(capsys.readouterr().err, "hatnet-export", "m.safetensors", "image_size", repr(side), 32, 4096)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors"]


def test_what_a_checkpoint_says_stays_with_it_when_its_variant_is_named(tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=2), tmp_path / "m.safetensors", {"classes": ["a", "b"]})
    out = tmp_path / "again.safetensors"
    assert status(["--checkpoint", tmp_path / "m.safetensors", "--variant", "hatnet_tiny", "--out", out]) == 0
    assert read_metadata(out)["classes"] == ["a", "b"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"qk_norm": True}, ["qk_norm"]),
        ({"depths": None}, ["depths", None]),
        ({"depthwise": "false"}, ["depthwise", "'false'"]),
        ({"embed_dims": [10**15] * 4}, ["configuration"]),
    ],
)
def test_a_checkpoint_whose_configuration_builds_no_model_is_refused(config, named, small_model, tmp_path, capsys):
    record = json.dumps({"config": {**small_model.config, **config}})
    save_file(small_model.state_dict(), tmp_path / "m.safetensors", {"hatnet": record})
    assert status(["--checkpoint", tmp_path / "m.safetensors", "--out", tmp_path / "m.pt2"]) == 1
    error_line(capsys.readouterr().err, "hatnet-export", tmp_path / "m.safetensors", *named)


WRONG_LINES = [
    ("--variant hatnet_tiny --out m.xyz", ["--out", "m.xyz", ".onnx", ".pt2", ".safetensors"]),
    ("--variant hatnet_tiny", ["--out"]),
    ("--out m.onnx", ["--checkpoint", "--variant"]),
    ("--pretrained --out m.pt2", ["--checkpoint", "--variant"]),
    ("--variant hatnet_huge --out m.onnx", ["--variant", "hatnet_huge", "hatnet_tiny"]),
    ("--variant hatnet_smal --out m.onnx", ["--variant", "hatnet_smal", "hatnet_small"]),
    ("--varaint hatnet_tiny --out m.onnx", ["--varaint", "--variant"]),
    ("--checkpoint w.safetensors --pretrained --out m.onnx", ["--checkpoint", "--pretrained"]),
    ("--variant hatnet_tiny --key ema --out m.onnx", ["--key", "--checkpoint"]),
    ("--variant hatnet_tiny --size 31 64 --out m.onnx", ["--size", 31, 32, 4096]),
    ("--variant hatnet_tiny --size many --out m.onnx", ["--size", "many", 32, 4096]),
    ("--variant hatnet_tiny --static --out m.safetensors", ["--static", "m.safetensors"]),
    ("--checkpoint= --out m.onnx", ["--checkpoint"]),
]
WRONG_FILES = [
    ("--variant hatnet_tiny --out nowhere/m.onnx", ["--out", "nowhere/m.onnx"]),
    ("--variant hatnet_tiny --out folder.onnx", ["--out", "folder.onnx"]),
    ("--checkpoint no.pth --out m.onnx", ["no.pth"]),
    ("--checkpoint no.safetensors --out m.onnx", ["no.safetensors"]),
    ("--checkpoint empty --out m.onnx", ["empty", "model.safetensors"]),
    ("--checkpoint empty --variant hatnet_tiny --out m.onnx", ["empty", "model.safetensors"]),
    ("--checkpoint w.pth --out m.onnx", ["w.pth", "--variant"]),
    ("--checkpoint text.pth --variant hatnet_tiny --out m.onnx", ["text.pth", "checkpoint"]),
    ("--checkpoint cut.safetensors --out m.onnx", ["cut.safetensors", "safetensors file"]),
    ("--checkpoint w.pth --variant hatnet_small --out m.onnx", ["w.pth", 3, "hatnet_small", "--variant hatnet_tiny"]),
    ("--checkpoint w.pth --variant hatnet_tiny --key ema --out m.onnx", ["w.pth", "key", "ema"]),
    ("--checkpoint deep.safetensors --out m.onnx", ["deep.safetensors", 4_000_000_003]),
    ("--checkpoint wide.safetensors --out m.onnx", ["wide.safetensors", "hatnet_tiny", 3, 900_000_000_000]),
    ("--variant hatnet_small_gelu --pretrained --out m.onnx", ["hatnet_small_gelu", "hatnet_tiny"]),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints that are damaged, or say of themselves what is not so."""
    folder = tmp_path_factory.mktemp("files")
    model = create_model("hatnet_tiny", num_classes=3)
    torch.save(model.state_dict(), folder / "w.pth")
    save_checkpoint(model, folder / "w.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:100_000])
    (folder / "text.pth").write_text("<html>")
    for name, change in (("deep", {"depths": [4_000_000_000, 1, 1, 1]}), ("wide", {"num_classes": 900_000_000_000})):
        record = json.dumps({"config": {**model.config, **change}})
        save_file(model.state_dict(), folder / f"{name}.safetensors", {"hatnet": record})
    (folder / "empty").mkdir()
    (folder / "folder.onnx").mkdir()
    return folder


@pytest.mark.parametrize(("line", "named"), WRONG_LINES)
def test_a_wrong_command_line_is_status_2_and_no_file(line, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status(line.split()) == 2
    said = capsys.readouterr()
    usage_error(said.err, *named)
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("line", "named"), WRONG_FILES)
def test_wrong_input_is_one_line_status_1_and_no_file(line, named, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    before = sorted(path.name for path in files.iterdir())
    assert status(line.split()) == 1
    said = capsys.readouterr()
    error_line(said.err, "hatnet-export", *named)
    assert "Traceback" not in said.err
    assert said.out == ""
    assert sorted(path.name for path in files.iterdir()) == before


def test_a_file_that_differs_from_the_model_is_not_written(small_model, tmp_path, monkeypatch, capsys):
    save_checkpoint(small_model, tmp_path / "weights.safetensors")
    monkeypatch.setattr("hatnet_core.export.TOLERANCE", -1.0)
    out = tmp_path / "m.pt2"
    assert status(["--checkpoint", tmp_path / "weights.safetensors", "--static", "--out", out]) == 1
    error_line(capsys.readouterr().err, "hatnet-export", out, -1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.safetensors"]


def test_the_installed_command_ends_as_it_does_in_process(tmp_path):
    command = [BIN / "hatnet-export", "--checkpoint", "no.pth", "--out", "m.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == error_line(done.stderr, "hatnet-export", "no.pth") + "\n"


def test_help_and_wrong_command_lines_wait_for_no_torch():
    code = "import sys\nfrom hatnet_core.cli import main\n"
    code += "try: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    for arguments in (["--help"], ["--variant", "hatnet_huge"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(("typed", "offered"), [("--che", "--checkpoint"), ("--out m.onnx --var", "--variant")])
def test_bash_completes_the_command(typed, offered):
    script = f"""
        source <({BIN}/hatnet-export --tyro-print-completion bash)
        COMP_WORDS=(hatnet-export $1) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        _tyro_hatnet_export
        echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script, "bash", typed], capture_output=True, text=True, check=True)
    assert offered in done.stdout.split()
