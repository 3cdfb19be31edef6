import argparse
import importlib.util
import io
import json
import os
import re
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
from hatnet_testing import check, error_line, usage_error

USAGE = [
    ("flops hatnet_huge", ["hatnet_huge", "hatnet_tiny", "hatnet_small"]),
    ("flops hatnet_smal", ["hatnet_smal", "hatnet_small"]),
    ("flops hatnet_tiny --size 224 16", ["--size", 16, 32, 65536]),
    ("params hatnet_tiny --sise 64 64", ["--sise", "hatnet-analysis params --help"]),
    ("flops hatnet_tiny --size 2² 64", ["--size", "2²"]),
    ("flops hatnet_tiny --size -64 64", ["--size", -64]),
    (f"flops hatnet_tiny --size {'10' * 20} 64", ["--size", "10" * 20, 65536]),
    ("flops hatnet_tiny --format xml", ["--format", "xml", "markdown"]),
    ("flops hatnet_tiny --form json", ["--form", "--format"]),
    ("flops", ["MODEL"]),
    ("speed", ["speed", "flops"]),
    ("paramz", ["paramz", "params"]),
    ("", ["COMMAND"]),
    ("flops timm/resnet_50", ["timm/resnet_50", "timm/resnet50"]),
    ("flops timm/", ["'timm/'", "timm.list_models()"]),
    ("params hatnet_tiny --by operator", ["--by", "operator", "stage"]),
    ("complexity timm/resnet18", ["Eq. 15", "timm/resnet18", "hatnet_tiny"]),
    ("complexity hatnet_tiny --growth", ["--growth", "hatnet_tiny"]),
    ("complexity --out growth.png", ["--out", "--growth", "growth.png"]),
    ("complexity --sizes 64 96", ["--sizes", "--growth", "64 96"]),
    ("complexity --device cpu", ["--device", "--growth", "cpu"]),
    ("complexity --growth --size 64 96", ["--size", "--growth", "64 96"]),
    ("complexity --growth --out growth.txt", ["--out", "growth.txt", ".png", ".svg"]),
    ("paper --table 1 --device cpu", ["--device", "table", "memory", "cpu"]),
    ("paper --table 5", ["--table", 5, "eq15"]),
    ("throughput hatnet_tiny --batch 0", ["--batch", 0]),
    ("throughput hatnet_tiny --dtype int8", ["--dtype", "int8", "bfloat16"]),
    ("attention absent.png", ["--point"]),
    ("attention absent.png --point a 1", ["--point", "'a'"]),
    ("attention absent.png --point 1 1 --stage 1", ["--stage", 1, 2, 3, 4, 5]),
    ("attention absent.png --point 1 1 --block -1", ["--block", -1]),
    ("attention absent.png --point 1 1 --variant hatnet_l", ["--variant", "hatnet_l", "hatnet_large"]),
    ("report", ["--out"]),
    ("report --out x --sections prices", ["--sections", "prices", "attention"]),
    ("report --out x --sections attention --table 1", ["--table", "section", "tables", 1]),
    ("report --out x --sections tables --image a.png", ["--image", "section", "attention", "a.png"]),
    ("report --out x --sections tables --checkpoint a", ["--checkpoint", "section", "attention"]),
    ("report --out x --sections compare --variant hatnet_tiny", ["--variant", "section", "attention", "hatnet_tiny"]),
    ("report --out x --sections attention --device cpu", ["--device", "complexity", "compare", "memory", "cpu"]),
    ("report --out x --sections tables --table 1 --device cpu", ["--device", "complexity", "compare", "memory"]),
]
"""Command lines that are wrong in themselves, and what is named."""

FAILURES = [
    ("flops timm/coatnet_0_224 --size 100", ["timm/coatnet_0_224", "100×100"]),
    ("complexity hatnet_small_window4", ["hatnet_small_window4", "224×224", "stage 4", "windows"]),
    ("complexity --growth --sizes 100", ["sizes", 32, 100]),
    ("complexity --growth --device tpu", ["device", "'tpu'"]),
    ("paper --table memory --device cuda:99", ["device", "'cuda:99'"]),
    ("throughput hatnet_tiny --device cuda:99", ["device", "'cuda:99'"]),
    ("compare hatnet_tiny --out nowhere/a.png", ["--out", "'nowhere/a.png'"]),
    ("compare hatnet_tiny --out folder.png", ["--out", "'folder.png'"]),
    ("attention absent.png --point 1 1", ["absent.png"]),
    ("attention folder.png --point 1 1", ["folder.png"]),
    ("attention text.png --point 1 1 --variant hatnet_tiny", ["text.png", "image"]),
    ("attention image.png --point 1 1", ["--checkpoint", "--variant"]),
    ("attention image.png --point 1 1 --checkpoint no.pth", ["no.pth"]),
    ("attention image.png --point 1 1 --checkpoint text.png", ["text.png", "checkpoint"]),
    ("attention image.png --point 1 1 --checkpoint folder.png", ["folder.png"]),
    ("attention image.png --point 999 1 --variant hatnet_tiny", ["point", "256×256", "x=999", "y=1"]),
    ("attention image.png --point 1 1 --variant hatnet_tiny --block 9", ["block", "stage 2", 0, 1, 9]),
    ("report --out x --image absent.png", ["absent.png"]),
    ("report --out text.png", ["--out", "'text.png'"]),
]
"""Command lines that name what cannot be used, and what is named."""


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
    assert done.returncode == 0
    check(done.stderr, "hatnet_tiny", "32×48")
    assert len(done.stderr.splitlines()) == 1  # progress
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


def test_the_installed_command_refuses_bad_input_in_one_line():
    done = run("attention", "absent.png", "--point", "1", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == error_line(done.stderr, "hatnet-analysis attention", "absent.png") + "\n"
    done = run("flops", "hatnet_huge")
    assert (done.returncode, done.stdout) == (2, "")
    usage_error(done.stderr, "hatnet_huge")


@pytest.mark.parametrize(
    ("line", "named", "expected"), [*((*wrong, 2) for wrong in USAGE), *((*wrong, 1) for wrong in FAILURES)]
)
def test_bad_input_is_a_status_and_a_message_that_names_it_and_what_was_expected(line, named, expected, files, capsys):
    before = sorted(files.iterdir())
    assert status(line.split()) == expected
    out, err = capsys.readouterr()
    if expected == 1:
        error_line(err, f"hatnet-analysis {line.split()[0]}", *named)
    else:
        usage_error(err, *named)
    assert out == ""
    assert "Traceback" not in err
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
    ("error", "named"),
    [
        (RuntimeError("can't allocate memory\nframe #0"), ["can't allocate memory"]),
        (MemoryError(), ["MemoryError"]),
        (TypeError("int() of a list"), ["TypeError", "int() of a list"]),
    ],
)
def test_whatever_a_model_raises_is_one_line(command, error, named, small, capsys, monkeypatch, tmp_path):
    def fails(*arguments, **keywords):
        raise error

    monkeypatch.setattr(FAILING[command], fails)
    assert status(small[command]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    error_line(err, f"hatnet-analysis {small[command][0]}", *named)
    assert "Traceback" not in err
    assert not (tmp_path / "page").exists()


def test_a_size_that_does_not_fit_is_named_with_the_model(small, capsys, monkeypatch):
    def out_of_memory(*arguments):
        raise RuntimeError("can't allocate memory\nframe #0")

    monkeypatch.setattr("hatnet_analysis.flops.count_flops", out_of_memory)
    assert status(["flops", "hatnet_tiny", "--size", "65536"]) == 1
    named = ["hatnet_tiny", "65536×65536", "can't allocate memory"]
    error_line(capsys.readouterr().err, "hatnet-analysis flops", *named)
    assert status([*small["attention"], "--size", "60000"]) == 1  # refused before the image is scaled
    named = ["hatnet_tiny", "60000×60000", "15,470,730 GiB", "4 GiB"]
    error_line(capsys.readouterr().err, "hatnet-analysis attention", *named)


@pytest.mark.parametrize("command", FAILING)
def test_a_reader_that_has_closed_ends_the_command_without_a_word(command, small, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody:  # noqa: PTH123  # a descriptor; Python flushes it at the end
        monkeypatch.setattr(sys, "stdout", nobody)
        assert status(small[command]) == 141
    assert not re.search("Traceback|error", capfd.readouterr().err)  # nothing but progress


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        command = Path(sysconfig.get_path("scripts")) / "hatnet-analysis"
        done = subprocess.run(
            [command, "params", "hatnet_tiny"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == error_line(done.stderr, "hatnet-analysis params", "No space left on device") + "\n"


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
    assert heading.split()[0] == "model"
    assert set(rule) == {"-", " "}
    assert row.split() == ["hatnet_tiny", "12.65"]


def test_markdown_is_a_table_of_github(capsys):
    main(["flops", "hatnet_tiny", "--size", "32", "32", "--format", "markdown"])
    heading, rule, row = capsys.readouterr().out.splitlines()
    assert set(rule) <= set("|-:")
    assert heading.count("|") == rule.count("|") == row.count("|") == 6
    assert row.strip("|").split()[0] == "hatnet_tiny"


def test_progress_is_shown_beside_the_output(capsys):
    main(["flops", "hatnet_tiny", "--size", "32", "32"])
    check(capsys.readouterr().err, "hatnet_tiny", "32×32")


COMMANDS = ["params", "flops", "complexity", "paper", "throughput", "compare", "attention", "report"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_what_can_be_asked_for_and_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments, expected in ((["--help"], COMMANDS), ([command, "--help"], [command, "--"])):
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
    error_line(capsys.readouterr().err, "hatnet-analysis attention", "point", "256×256", "x=256", "y=40")


def test_throughput_of_two_models_is_a_ratio(capsys):
    main(["throughput", "hatnet_tiny", "timm/resnet18", "--size", "32", "32", "--batch", "1", "--rounds", "1"])
    out, err = capsys.readouterr()
    assert "ratio" in out.splitlines()[0]
    assert out.splitlines()[2].split()[-1] == "1.00"
    check(err, "hatnet_tiny", "timm/resnet18")


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
