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

from hatnet_analysis import __version__, choices, count_flops
from hatnet_analysis.cli import main
from hatnet_core import create_model, list_models
from hatnet_core.model import MIN_SIZE

BAD_INPUT = [
    (["flops", "hatnet_huge"], ["'hatnet_huge'", "expected one of hatnet_tiny, hatnet_small"]),
    (["flops", "hatnet_tiny", "--size", "224", "16"], ["--size", "'16'", "pixels from 32 to 65536"]),
    (["params", "hatnet_tiny", "--sise", "64", "64"], ["'--sise'", "expected hatnet-analysis params [-h]"]),
    (["flops", "hatnet_tiny", "--size", "2²", "64"], ["--size", "'2²'", "whole number of pixels"]),
    (["flops", "hatnet_tiny", "--size", "-64", "64"], ["--size", "'-64'", "whole number of pixels"]),
    (["flops", "hatnet_tiny", "--size", "10" * 20, "64"], ["--size", "10" * 20, "to 65536"]),
    (["flops", "hatnet_tiny", "--format", "xml"], ["--format", "'xml'", "'markdown'"]),
    (["flops", "hatnet_tiny", "--form", "json"], ["'--form'", "expected hatnet-analysis flops [-h]"]),
    (["flops"], ["required: MODEL"]),
    (["speed"], ["'speed'", "'flops'"]),
    ([], ["required: COMMAND"]),
    (["flops", "timm/resnet_50"], ["unknown model 'timm/resnet_50'", "timm/resnet50"]),
    (["flops", "timm/coatnet_0_224", "--size", "100", "100"], ["cannot run timm/coatnet_0_224 at 100×100"]),
    (["params", "hatnet_tiny", "--by", "operator"], ["--by", "'operator'", "'stage'"]),
    (["complexity", "timm/resnet18"], ["Eq. 15 is about HAT-Net", "'timm/resnet18'"]),
    (["complexity", "hatnet_small_window4"], ["hatnet_small_window4 at 224×224: stage 4 attends in windows"]),
    (["complexity", "hatnet_tiny", "--growth"], ["--growth", "takes no model, got hatnet_tiny"]),
    (["complexity", "--out", "growth.png"], ["--out has an effect only with --growth, got growth.png"]),
    (["complexity", "--sizes", "64", "96"], ["--sizes has an effect only with --growth, got 64 96"]),
    (["complexity", "--device", "cpu"], ["--device has an effect only with --growth, got cpu"]),
    (["complexity", "--growth", "--size", "64", "96"], ["--size has an effect only without --growth", "got 64 96"]),
    (["paper", "--table", "1", "--device", "cpu"], ["--device has an effect only with the table memory, got cpu"]),
    (["paper", "--table", "memory", "--device", "cuda:99"], ["device cuda:99 is not there"]),
    (["flops", "timm/"], ["unknown model 'timm/'; expected timm/ and a name of timm.list_models()"]),
    (["complexity", "--growth", "--sizes", "100"], ["sizes must be multiples of 32, got 100"]),
    (["complexity", "--growth", "--out", "growth.txt"], ["--out must end in .png or .svg, got growth.txt"]),
    (["complexity", "--growth", "--device", "tpu"], ["unknown device 'tpu'"]),
    (["paper", "--table", "5"], ["--table", "'5'", "'eq15'"]),
    (["throughput", "hatnet_tiny", "--device", "cuda:99"], ["device cuda:99 is not there"]),
    (["throughput", "hatnet_tiny", "--batch", "0"], ["--batch", "'0'", "whole number from 1 up"]),
    (["throughput", "hatnet_tiny", "--dtype", "int8"], ["--dtype", "'int8'", "'bfloat16'"]),
    (
        ["compare", "hatnet_tiny", "--out", "nowhere/a.png"],
        ["in a folder that exists and can be written, got nowhere/a.png"],
    ),
    (["attention", "absent.png", "--point", "1", "1"], ["no image at absent.png"]),
    (["attention", "absent.png"], ["required: --point"]),
    (["attention", "absent.png", "--point", "a", "1"], ["--point", "'a'"]),
    (["attention", "absent.png", "--point", "1", "1", "--stage", "1"], ["--stage", "choose from 2, 3, 4, 5"]),
    (["report"], ["required: --out"]),
    (["report", "--out", "x", "--sections", "prices"], ["--sections", "'prices'", "'attention'"]),
    (["report", "--out", "x", "--image", "absent.png"], ["no image at absent.png"]),
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


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT[:2])
def test_the_installed_command_refuses_bad_input_in_one_line(arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"hatnet-analysis {arguments[0]}: error: ")
    assert done.stderr.count("\n") == 1
    assert all(words in done.stderr for words in said)


@pytest.mark.parametrize(("arguments", "said"), BAD_INPUT)
def test_bad_input_exits_with_2_and_one_line_that_names_it_and_what_was_expected(arguments, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    *progress, last = err.splitlines()
    assert last.startswith("hatnet-analysis")
    assert all(line.endswith(" ...") for line in progress)
    assert all(words in err for words in said)


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
    with pytest.raises(SystemExit) as exit_:
        main(small[command])
    out, err = capsys.readouterr()
    assert (exit_.value.code, out) == (2, "")
    *progress, last = err.splitlines()
    assert last.startswith(f"hatnet-analysis {small[command][0]}: error: ")
    assert said in last
    assert all(line.endswith(" ...") for line in progress)
    assert not (tmp_path / "page").exists()


def test_a_size_that_does_not_fit_is_named_with_the_model(small, capsys, monkeypatch):
    def out_of_memory(*arguments):
        raise RuntimeError("can't allocate memory\nframe #0")

    monkeypatch.setattr("hatnet_analysis.flops.count_flops", out_of_memory)
    with pytest.raises(SystemExit):
        main(["flops", "hatnet_tiny", "--size", "65536", "65536"])
    expected = (
        "cannot run hatnet_tiny at 65536×65536, expected a size that it takes and that fits: can't allocate memory\n"
    )
    assert capsys.readouterr().err.endswith(expected)
    with pytest.raises(SystemExit):
        main([*small["attention"], "--size", "60000", "60000"])  # refused before the image is scaled
    expected = "cannot run hatnet_tiny at 60000×60000: attention weights of 15,470,730 GiB; expected at most 4 GiB\n"
    assert capsys.readouterr().err.endswith(expected)


def test_where_an_error_comes_from_is_shown_if_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("HATNET_TRACEBACK", "1")
    with pytest.raises(SystemExit) as exit_:
        main(["attention", "absent.png", "--point", "1", "1"])
    assert exit_.value.code == 2
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "Traceback (most recent call last):"
    assert last == "hatnet-analysis attention: error: no image at absent.png: expected an existing image file"


@pytest.mark.parametrize("command", [*FAILING, "help", "version", "help of a command"])
def test_a_reader_that_has_closed_ends_the_command_without_a_word(command, small, capfd, monkeypatch):
    special = {"help": ["--help"], "version": ["--version"], "help of a command": ["flops", "--help"]}
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody:  # noqa: PTH123  # a descriptor; Python flushes it at the end
        monkeypatch.setattr(sys, "stdout", nobody)
        with pytest.raises(SystemExit) as exit_:
            main({**small, **special}[command])
    assert exit_.value.code == 1
    assert all(line.endswith(" ...") for line in capfd.readouterr().err.splitlines())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        command = Path(sysconfig.get_path("scripts")) / "hatnet-analysis"
        done = subprocess.run(
            [command, "params", "hatnet_tiny"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (
        2,
        "hatnet-analysis params: error: [Errno 28] No space left on device\n",
    )


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


def test_the_names_on_the_command_line_are_those_of_the_modules_that_measure():
    assert list(choices.MODELS) == list_models()
    assert choices.MIN_SIZE == MIN_SIZE


def test_the_command_line_itself_imports_nothing_that_takes_seconds():
    code = (
        "import sys, types\n"
        "package = types.ModuleType('hatnet_analysis')\n"
        f"package.__path__ = {list(importlib.util.find_spec('hatnet_analysis').submodule_search_locations)!r}\n"
        "sys.modules['hatnet_analysis'] = package\n"
        "import hatnet_analysis.cli\n"
        "hatnet_analysis.cli._parser().format_help()\n"
        "assert not {'torch', 'matplotlib', 'fvcore', 'PIL'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
def test_help_names_what_can_be_asked_for(command, capsys):
    for arguments, expected in ((["--help"], COMMANDS), ([command, "--help"], ["default", "--"])):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        out = capsys.readouterr().out
        assert all(words in out for words in expected)
        assert max(map(len, out.splitlines())) < 120


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
    with pytest.raises(SystemExit):
        main([*command[:-2], "256", "40"])
    assert "point must be inside the image of 256×256, got x=256, y=40" in capsys.readouterr().err


def test_throughput_of_two_models_is_a_ratio(capsys):
    main(["throughput", "hatnet_tiny", "timm/resnet18", "--size", "32", "32", "--batch", "1", "--rounds", "1"])
    out, err = capsys.readouterr()
    assert "ratio" in out.splitlines()[0]
    assert out.splitlines()[2].split()[-1] == "1.00"
    assert "round 1 of 1: timm/resnet18 ..." in err


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"hatnet-analysis {__version__}\n"
