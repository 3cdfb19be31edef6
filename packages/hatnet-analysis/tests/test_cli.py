import argparse
import importlib.util
import io
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from PIL import Image

from hatnet_analysis import __version__, count_flops
from hatnet_analysis.cli import main, parser
from hatnet_core import create_model, list_models, save_checkpoint
from hatnet_core.commands import SHARED

USAGE = [
    (["flops", "hatnet_huge"], ["'hatnet_huge'", "expected one of hatnet_tiny, hatnet_small"]),
    (["flops", "hatnet_smal"], ["'hatnet_smal'", "did you mean hatnet_small?"]),
    (["flops", "hatnet_tiny", "--size", "224", "16"], ["--size", "'16'", "pixels from 32 to 65536"]),
    (["params", "hatnet_tiny", "--sise", "64", "64"], ["'--sise'", "see hatnet-analysis params --help"]),
    (["flops", "hatnet_tiny", "--size", "2²", "64"], ["--size", "'2²'", "whole number of pixels"]),
    (["flops", "hatnet_tiny", "--size", "-64", "64"], ["--size", "'-64'", "whole number of pixels"]),
    (["flops", "hatnet_tiny", "--size", "10" * 20, "64"], ["--size", "10" * 20, "to 65536"]),
    (["flops", "hatnet_tiny", "--format", "xml"], ["--format", "'xml'", "markdown"]),
    (["flops", "hatnet_tiny", "--form", "json"], ["'--form'", "did you mean --format?"]),
    (["flops"], ["required: MODEL"]),
    (["speed"], ["'speed'", "flops"]),
    (["paramz"], ["'paramz'", "did you mean params?"]),
    ([], ["required: COMMAND"]),
    (["flops", "timm/resnet_50"], ["unknown model 'timm/resnet_50'", "timm/resnet50"]),
    (["flops", "timm/"], ["unknown model 'timm/'; expected timm/ and a name of timm.list_models()"]),
    (["params", "hatnet_tiny", "--by", "operator"], ["--by", "'operator'", "stage"]),
    (["complexity", "timm/resnet18"], ["Eq. 15 is about HAT-Net", "'timm/resnet18'"]),
    (["complexity", "hatnet_tiny", "--growth"], ["--growth", "takes no model, got hatnet_tiny"]),
    (["complexity", "--out", "growth.png"], ["--out has an effect only with --growth, got growth.png"]),
    (["complexity", "--sizes", "64", "96"], ["--sizes has an effect only with --growth, got 64 96"]),
    (["complexity", "--device", "cpu"], ["--device has an effect only with --growth, got cpu"]),
    (["complexity", "--growth", "--size", "64", "96"], ["--size has an effect only without --growth", "got 64 96"]),
    (["complexity", "--growth", "--out", "growth.txt"], ["--out", "'growth.txt' does not end in .png or .svg"]),
    (["paper", "--table", "1", "--device", "cpu"], ["--device has an effect only with the table memory, got cpu"]),
    (["paper", "--table", "5"], ["--table", "'5'", "eq15"]),
    (["throughput", "hatnet_tiny", "--batch", "0"], ["--batch", "'0'", "whole number from 1 up"]),
    (["throughput", "hatnet_tiny", "--dtype", "int8"], ["--dtype", "'int8'", "bfloat16"]),
    (["attention", "absent.png"], ["required: --point"]),
    (["attention", "absent.png", "--point", "a", "1"], ["--point", "'a' is not a number of pixels"]),
    (["attention", "absent.png", "--point", "1", "1", "--stage", "1"], ["--stage", "choose from 2, 3, 4, 5"]),
    (["attention", "absent.png", "--point", "1", "1", "--block", "-1"], ["--block", "'-1' is not a whole number"]),
    (["attention", "absent.png", "--point", "1", "1", "--variant", "hatnet_l"], ["'hatnet_l', did you mean hatnet_"]),
    (["report"], ["required: --out"]),
    (["report", "--out", "x", "--sections", "prices"], ["--sections", "'prices'", "attention"]),
    (
        ["report", "--out", "x", "--sections", "attention", "--table", "1"],
        ["--table", "with the section tables, got 1"],
    ),
    (
        ["report", "--out", "x", "--sections", "tables", "--image", "a.png"],
        ["--image", "section attention, got a.png"],
    ),
    (["report", "--out", "x", "--sections", "tables", "--checkpoint", "a"], ["--checkpoint", "section attention"]),
    (
        ["report", "--out", "x", "--sections", "compare", "--variant", "hatnet_tiny"],
        ["--variant", "section attention"],
    ),
    (["report", "--out", "x", "--sections", "attention", "--device", "cpu"], ["--device", "the sections complexity"]),
    (
        ["report", "--out", "x", "--sections", "tables", "--table", "1", "--device", "cpu"],
        ["--device has an effect only with", "the table memory, got cpu"],
    ),
]
"""Command lines that are wrong in themselves, and what is said of them."""

POINT = ["--point", "1", "1"]

FAILURES = [
    (["flops", "timm/coatnet_0_224", "--size", "100"], ["cannot run timm/coatnet_0_224 at 100×100"]),
    (["complexity", "hatnet_small_window4"], ["hatnet_small_window4 at 224×224: stage 4 attends in windows"]),
    (["complexity", "--growth", "--sizes", "100"], ["sizes must be multiples of 32, got 100"]),
    (["complexity", "--growth", "--device", "tpu"], ["device must be auto, cpu, or a GPU", "got 'tpu'"]),
    (["paper", "--table", "memory", "--device", "cuda:99"], ["device must be auto, cpu, or a GPU", "got 'cuda:99'"]),
    (["throughput", "hatnet_tiny", "--device", "cuda:99"], ["device must be auto, cpu, or a GPU", "got 'cuda:99'"]),
    (
        ["compare", "hatnet_tiny", "--out", "nowhere/a.png"],
        ["--out must be a file in a folder that exists and can be written, got 'nowhere/a.png'"],
    ),
    (["compare", "hatnet_tiny", "--out", "folder.png"], ["--out must be a file in a folder that exists"]),
    (["attention", "absent.png", *POINT], ["no image at absent.png"]),
    (["attention", "folder.png", *POINT], ["no image at folder.png: expected an existing image file"]),
    (["attention", "text.png", *POINT, "--variant", "hatnet_tiny"], ["text.png is not a readable image"]),
    (["attention", "image.png", *POINT], ["expected --checkpoint, or --variant"]),
    (["attention", "image.png", *POINT, "--checkpoint", "no.pth"], ["no checkpoint at no.pth: expected an existing"]),
    (["attention", "image.png", *POINT, "--checkpoint", "text.png"], ["text.png is not a checkpoint of plain"]),
    (["attention", "image.png", *POINT, "--checkpoint", "folder.png"], ["folder.png"]),
    (
        ["attention", "image.png", "--point", "999", "1", "--variant", "hatnet_tiny"],
        ["point must be inside the image of 256×256, got x=999, y=1"],
    ),
    (
        ["attention", "image.png", *POINT, "--variant", "hatnet_tiny", "--block", "9"],
        ["block of stage 2 must be from 0 to 1, got 9"],
    ),
    (["report", "--out", "x", "--image", "absent.png"], ["no image at absent.png"]),
    (["report", "--out", "text.png"], ["--out must be a folder that can be made and written, got 'text.png'"]),
]
"""Command lines that name what cannot be used, and what is said of it."""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The folder in which the wrong command lines are tried."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").save("image.png")
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def status(arguments):
    """Exit status of the command, called in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def run(*arguments):
    """The installed command in a process of its own."""
    command = Path(sysconfig.get_path("scripts")) / "hatnet-analysis"
    return subprocess.run([command, *arguments], capture_output=True, text=True, encoding="utf-8", check=False)


def test_the_installed_command_counts_and_writes_nothing_else():
    done = run("flops", "hatnet_tiny", "--size", "32", "48", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "counting hatnet_tiny at 32×48 ...\n")
    total = count_flops(create_model("hatnet_tiny"), 32, 48).total
    assert json.loads(done.stdout) == [
        {
            "model": "hatnet_tiny",
            "height": 32,
            "width": 48,
            "flops_paper": total.paper,
            "flops_complete": total.complete,
        }
    ]


@pytest.mark.parametrize(("arguments", "said", "expected"), [(*USAGE[0], 2), (*FAILURES[8], 1)])
def test_the_installed_command_refuses_bad_input_in_one_line(arguments, said, expected):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (expected, "")
    assert done.stderr.startswith(f"hatnet-analysis {arguments[0]}: error: ")
    assert done.stderr.count("\n") == 1
    assert all(words in done.stderr for words in said)


@pytest.mark.parametrize(
    ("arguments", "said", "expected"),
    [*((*wrong, 2) for wrong in USAGE), *((*wrong, 1) for wrong in FAILURES)],
)
def test_bad_input_is_a_status_and_one_line_that_names_it_and_what_was_expected(
    arguments, said, expected, files, capsys
):
    before = sorted(files.iterdir())
    assert status(arguments) == expected
    out, err = capsys.readouterr()
    assert out == ""
    *progress, last = err.splitlines()
    assert last.startswith("hatnet-analysis")
    assert all(line.endswith(" ...") for line in progress)
    assert all(words in last for words in said)
    assert sorted(files.iterdir()) == before


@pytest.fixture
def small(tmp_path):
    """Arguments with which each command is through in a second or two."""
    Image.linear_gradient("L").save(tmp_path / "image.png")
    tiny, speed = ["hatnet_tiny", "--size", "32", "32"], ["--batch", "1", "--rounds", "1"]
    return {
        "params": ["params", "hatnet_tiny"],
        "flops": ["flops", *tiny],
        "complexity": ["complexity", *tiny],
        "growth": ["complexity", "--growth", "--sizes", "32"],
        "paper": ["paper", "--table", "eq15"],
        "throughput": ["throughput", *tiny, *speed],
        "compare": ["compare", *tiny, *speed],
        "attention": ["attention", str(tmp_path / "image.png"), "--variant", "hatnet_tiny", "--point", "3", "4"],
        "report": ["report", "--out", str(tmp_path / "page"), "--sections", "tables", "--table", "eq15"],
    }


FAILING = {
    "params": "hatnet_analysis.models.on_meta",
    "flops": "hatnet_analysis.flops.count_flops",
    "complexity": "hatnet_analysis.paper.eq15_rows",
    "growth": "hatnet_analysis.growth.growth",
    "paper": "hatnet_analysis.paper.eq15_rows",
    "throughput": "hatnet_analysis.throughput.load_model",
    "compare": "hatnet_analysis.throughput.count_flops",
    "attention": "hatnet_analysis.attention_maps.record_weights",
    "report": "hatnet_analysis.paper.eq15_rows",
}
"""A piece of each command's work."""


@pytest.mark.parametrize("command", FAILING)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("can't allocate memory\nframe #0"), "can't allocate memory"),
        (MemoryError(), "MemoryError"),
        (TypeError("int() of a list"), "TypeError: int() of a list"),
    ],
)
def test_whatever_a_model_raises_is_one_line(command, error, said, small, capsys, monkeypatch, tmp_path):
    def fails(*arguments, **keywords):
        raise error

    monkeypatch.setattr(FAILING[command], fails)
    assert status(small[command]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    *progress, last = err.splitlines()
    assert last.startswith(f"hatnet-analysis {small[command][0]}: error: ")
    assert said in last
    assert all(line.endswith(" ...") for line in progress)
    assert not (tmp_path / "page").exists()


def test_a_size_that_does_not_fit_is_named_with_the_model(small, capsys, monkeypatch):
    def out_of_memory(*arguments):
        raise RuntimeError("can't allocate memory\nframe #0")

    monkeypatch.setattr("hatnet_analysis.flops.count_flops", out_of_memory)
    assert status(["flops", "hatnet_tiny", "--size", "65536"]) == 1
    expected = (
        "cannot run hatnet_tiny at 65536×65536, expected a size that it takes and that fits: can't allocate memory\n"
    )
    assert capsys.readouterr().err.endswith(expected)
    assert status([*small["attention"], "--size", "60000"]) == 1  # refused before the image is scaled
    expected = "cannot run hatnet_tiny at 60000×60000: attention weights of 15,470,730 GiB; expected at most 4 GiB\n"
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize("command", FAILING)
def test_a_reader_that_has_closed_ends_the_command_without_a_word(command, small, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody:  # noqa: PTH123  # a descriptor; Python flushes it at the end
        monkeypatch.setattr(sys, "stdout", nobody)
        assert status(small[command]) == 141
    assert all(line.endswith(" ...") for line in capfd.readouterr().err.splitlines())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        command = Path(sysconfig.get_path("scripts")) / "hatnet-analysis"
        done = subprocess.run(
            [command, "params", "hatnet_tiny"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    line = "hatnet-analysis params: error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


@pytest.mark.parametrize("style", ["table", "markdown", "json"])
def test_an_output_without_the_letters_gets_question_marks_and_json_its_escapes(style, monkeypatch):
    row = {"model": "hatnet_tiny", "stages": "C48 ×2, 14²"}
    monkeypatch.setattr("hatnet_analysis.paper.table_rows", lambda *arguments: [row])
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    main(["paper", "--table", "1", "--format", style])
    written = output.buffer.getvalue().decode("ascii")
    if style == "json":
        assert json.loads(written) == [row]
    else:
        assert "C48 ?2, 14?" in written


def test_help_and_wrong_command_lines_wait_for_nothing_that_takes_seconds():
    code = "import sys\nfrom hatnet_analysis.cli import main\n"
    code += "try: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    for arguments in (["flops", "--help"], ["flops", "hatnet_tiny", "--size", "16"]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert not {"torch", "matplotlib", "fvcore", "PIL"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="needs MMDetection")
def test_the_libraries_of_dense_tasks_add_nothing_to_the_output():
    done = run("params", "retinanet_hatnet-t_fpn_1x_coco", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = json.loads(done.stdout)
    assert row["model"] == "retinanet_hatnet-t_fpn_1x_coco"


def test_params_lists_every_model_asked_for_in_order(capsys):
    main(["params", *reversed(list_models()), "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in rows] == ["hatnet_large", "hatnet_medium", "hatnet_small", "hatnet_tiny"]
    assert [round(row["params"] / 1e6, 1) for row in rows] == [63.1, 42.9, 25.7, 12.7]  # Table 1


def test_a_table_is_for_reading_in_millions(capsys):
    main(["params", "hatnet_tiny"])
    heading, rule, row = capsys.readouterr().out.splitlines()
    assert heading.split("  ")[0] == "model"
    assert heading.endswith("params (M)")
    assert set(rule) == {"-", " "}
    assert row.split() == ["hatnet_tiny", "12.65"]


def test_markdown_is_a_table_of_github(capsys):
    main(["flops", "hatnet_tiny", "--size", "32", "32", "--format", "markdown"])
    heading, rule, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in heading.strip("|").split("|")]
    assert cells == ["model", "height", "width", "FLOPs, paper (G)", "FLOPs, complete (G)"]
    assert set(rule) <= set("|-:")
    assert row.count("|") == 6


def test_progress_is_shown_beside_the_output(capsys):
    main(["flops", "hatnet_tiny", "--size", "32", "32"])
    assert capsys.readouterr().err == "counting hatnet_tiny at 32×32 ...\n"


COMMANDS = ["params", "flops", "complexity", "paper", "throughput", "compare", "attention", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_what_can_be_asked_for_and_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments, expected in ((["--help"], COMMANDS), ([command, "--help"], ["example:", "default", "--"])):
        assert status(arguments) == 0
        out = capsys.readouterr().out
        assert all(words in out for words in expected)
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("by", "parts"),
    [
        ("stage", ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]),
        ("operator", ["conv", "group_norm", "attention", "linear"]),
    ],
)
def test_flops_can_be_asked_for_by_part(by, parts, capsys):
    main(["flops", "hatnet_tiny", "--size", "32", "32", "--by", by, "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["part"] for row in rows] == parts
    total = count_flops(create_model("hatnet_tiny"), 32, 32).total
    assert sum(row["flops_complete"] for row in rows) == total.complete


def test_params_by_block_add_up_to_the_model(capsys):
    main(["params", "hatnet_tiny", "--by", "block", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert "stages.2.blocks.5" in [row["part"] for row in rows]
    assert sum(row["params"] for row in rows) == 12_650_152


def test_complexity_of_a_stage_is_shown_beside_the_equations(capsys):
    main(["complexity", "hatnet_tiny", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["h_mhsa_macs"] == 63_146_496
    assert all(row["measured_macs"] == row["h_mhsa_macs"] and row["verdict"] == "equal" for row in rows)


def test_growth_is_a_table_a_picture_and_one_json(capsys, tmp_path):
    main(["complexity", "--growth", "--sizes", "64", "128", "--out", str(tmp_path / "growth.png")])
    out = capsys.readouterr().out
    assert out.count("H-MHSA") >= 3
    assert "from where on one is dearer than the other:" in out
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    main(["complexity", "--growth", "--sizes", "64", "128", "--format", "json"])
    (record,) = json.loads(capsys.readouterr().out)
    assert record.keys() == {"growth", "exponents", "crossings"}


def test_attention_is_drawn_and_listed(capsys, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "image.png")
    command = ["attention", str(tmp_path / "image.png"), "--variant", "hatnet_tiny", "--point", "200", "40"]
    main([*command, "--stage", "3", "--head", "1", "--out", str(tmp_path / "seen.png")])
    assert "global (pooled)" in capsys.readouterr().out
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")
    main([*command, "--format", "json"])
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["row"], record["column"]) == (8, 43)  # of 56×56, the image being 256×256
    assert status([*command[:-2], "256", "40"]) == 1
    assert "point must be inside the image of 256×256, got x=256, y=40" in capsys.readouterr().err


def test_throughput_of_two_models_is_a_ratio(capsys):
    main(["throughput", "hatnet_tiny", "timm/resnet18", "--size", "32", "32", "--batch", "1", "--rounds", "1"])
    out, err = capsys.readouterr()
    assert "ratio" in out.splitlines()[0]
    assert out.splitlines()[2].split()[-1] == "1.00"
    assert "round 1 of 1: timm/resnet18 ..." in err


def test_the_attention_of_a_checkpoint_is_that_at_the_size_of_its_training(capsys, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "image.png")
    weights = tmp_path / "own.safetensors"
    save_checkpoint(create_model("hatnet_tiny", num_classes=2), weights, {"image_size": 64})
    command = ["attention", str(tmp_path / "image.png"), "--checkpoint", str(weights), "--point", "200", "40"]
    for more, expected in (([], [64, 64]), (["--size", "32", "96"], [32, 96])):
        assert status([*command, *more, "--format", "json"]) == 0
        (record,) = json.loads(capsys.readouterr().out)
        assert record["input_size"] == expected


def test_version_is_that_of_the_package(capsys):
    assert status(["--version"]) == 0
    assert capsys.readouterr().out == f"hatnet-analysis {__version__}\n"


def test_options_that_all_commands_share_have_their_one_form():
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    parsers = [parser(), *commands.choices.values()]
    for one in parsers:
        for action in one._actions:
            for option in SHARED.keys() & set(action.option_strings):
                assert action.help.startswith(SHARED[option]), f"{one.prog} {option}: {action.help}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [("hatnet-analysis comp", "compare"), ("hatnet-analysis flops hatnet_small_g", "hatnet_small_gelu")],
)
def test_a_shell_is_told_what_completes_a_line(line, expected):
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": " ", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    command = Path(sys.executable).with_name(line.partition(" ")[0])
    answer = subprocess.run(  # the answer is written to descriptor 8
        ["bash", "-c", f"{command} 8>&1 >/dev/null 2>&1"],
        env={**os.environ, **asked},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert expected in answer.stdout.split()
