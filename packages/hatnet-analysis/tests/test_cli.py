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
from hatnet_analysis.cli import COMMANDS, main
from hatnet_core import create_model, list_models, save_checkpoint
from hatnet_testing import check, error_line, usage_error

TINY = "hatnet_tiny"

USAGE = [
    ("", "params", "report"),
    ("speed", "speed", "flops"),
    ("paramz", "paramz", "params"),
    ("flops", "MODEL"),
    ("flops hatnet_huge", "'hatnet_huge'", TINY, "hatnet_small"),
    ("flops hatnet_smal", "'hatnet_smal'", "hatnet_small"),
    ("flops timm/resnet_50", "'timm/resnet_50'", "timm/resnet50"),
    ("flops timm/", "'timm/'", "timm.list_models()"),
    ("flops hatnet_tiny --size 224 16", "--size", "'16'", 32, 65536),
    ("flops hatnet_tiny --size 2² 64", "--size", "'2²'"),
    ("flops hatnet_tiny --size -64 64", "--size"),
    (f"flops hatnet_tiny --size {'10' * 20} 64", "--size", 65536),
    ("flops hatnet_tiny --size 64 64 64", "--size", "'64 64 64'"),
    ("flops hatnet_tiny --format xml", "--format", "'xml'", "markdown"),
    ("flops hatnet_tiny --form json", "--form", "--format"),
    ("params hatnet_tiny --sise 64 64", "--sise", "hatnet-analysis params --help"),
    ("params hatnet_tiny --by operator", "--by", "'operator'", "stage"),
    ("complexity timm/resnet18", "'timm/resnet18'", TINY),
    ("complexity hatnet_tiny --growth", TINY, "growth"),
    ("complexity --out growth.png", "--out", "growth.png"),
    ("complexity --sizes 64 96", "--sizes", "--size"),
    ("complexity --device cpu", "--device", "cpu"),
    ("growth --size 64 96", "--size", "--sizes"),
    ("growth --sizes", "--sizes", "SIDE"),
    ("growth --device tpu", "--device", "'tpu'", "auto", "cpu"),
    ("complexity --growth --out growth.txt", "--out", "'growth.txt'", ".png", ".svg"),
    ("paper --table 1 --device cpu", "--device", "memory", "cpu"),
    ("paper --table 5", "--table", "'5'", "eq15"),
    ("paper --table", "--table", "TABLE"),
    ("throughput hatnet_tiny --batch 0", "--batch", "'0'", 1),
    ("throughput hatnet_tiny --dtype int8", "--dtype", "'int8'", "bfloat16"),
    ("attention absent.png", "--point"),
    ("attention absent.png --point a 1", "--point", "a"),
    ("attention absent.png --point 1 1 --stage 1", "--stage", "'1'", "'2'", "'5'"),
    ("attention absent.png --point 1 1 --block -1", "--block"),
    ("attention absent.png --point 1 1 --variant hatnet_l", "--variant", "'hatnet_l'", "hatnet_large"),
    ("report", "--out"),
    ("report --out x --sections prices", "--sections", "'prices'", "attention"),
    ("report --out x --sections attention --table 1", "--table", "tables", 1),
    ("report --out x --sections tables --image a.png", "--image", "attention", "a.png"),
    ("attention absent.png --point 1 1 --pretrained", "--pretrained", "--variant"),
    ("attention absent.png --point 1 1 --pretrained --checkpoint a", "--pretrained", "--checkpoint", "a"),
    ("report --out x --sections tables --pretrained", "--pretrained", "attention"),
    ("report --out x --sections tables --checkpoint a", "--checkpoint", "attention", "a"),
    ("report --out x --sections compare --variant hatnet_tiny", "--variant", "attention", TINY),
    ("report --out x --sections attention --device cpu", "--device", "complexity", "compare", "memory"),
    ("report --out x --sections tables --table 1 --device cpu", "--device", "memory", "cpu"),
]
"""Command lines that are wrong in themselves, and what the message names."""

FAILURES = [
    ("flops timm/coatnet_0_224 --size 100", "timm/coatnet_0_224", "100×100"),
    ("complexity hatnet_small_window4", "hatnet_small_window4", "224×224", "stage 4"),
    ("growth --sizes 100", "sizes", 32, 100),
    ("paper --table memory --device cuda:99", "--device", "'cuda:99'"),
    ("throughput hatnet_tiny --device cuda:99", "--device", "'cuda:99'"),
    ("compare hatnet_tiny --out nowhere/a.png", "--out", "'nowhere/a.png'"),
    ("compare hatnet_tiny --out folder.png", "--out", "'folder.png'"),
    ("attention absent.png --point 1 1", "absent.png"),
    ("attention folder.png --point 1 1", "folder.png"),
    ("attention text.png --point 1 1 --variant hatnet_tiny", "text.png"),
    ("attention image.png --point 1 1", "--checkpoint", "--variant"),
    ("attention image.png --point 1 1 --checkpoint no.pth", "no.pth"),
    ("attention image.png --point 1 1 --checkpoint text.png", "text.png"),
    ("attention image.png --point 1 1 --checkpoint folder.png", "folder.png"),
    ("attention image.png --point 999 1 --variant hatnet_tiny", "--point", "256×256", "x=999", "y=1"),
    ("attention image.png --point 256 40 --variant hatnet_tiny", "--point", "256×256", "x=256", "y=40"),
    ("attention image.png --point 1 1 --variant hatnet_tiny --block 9", "block", 9, "stage 2"),
    ("attention image.png --point 1 1 --variant hatnet_tiny --size 60000", TINY, "60000×60000", "4 GiB"),
    ("report --out x --image absent.png", "absent.png"),
    ("report --out text.png", "--out", "'text.png'"),
]
"""Command lines that name what cannot be used, and what the message names."""

SMALL = {
    "params hatnet_tiny": "models.on_meta",
    "flops hatnet_tiny --size 32": "flops.count_flops",
    "complexity hatnet_tiny --size 32": "paper.eq15_rows",
    "growth --sizes 32": "growth.growth",
    "paper --table eq15": "paper.eq15_rows",
    "throughput hatnet_tiny --size 32 --batch 1 --rounds 1": "throughput.load_model",
    "compare hatnet_tiny --size 32 --batch 1 --rounds 1": "throughput.count_flops",
    "attention image.png --variant hatnet_tiny --point 3 4": "attention_maps.record_weights",
    "report --out page --sections tables --table eq15": "paper.eq15_rows",
}
"""Command lines that take a second or two, and a piece of the work of each."""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The current folder, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").save("image.png")
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def status(line):
    """Exit status of the command, called in this process."""
    try:
        return main(line.split())
    except SystemExit as stop:
        return stop.code


def printed(line, capsys):
    """Rows that the command prints as JSON."""
    assert status(f"{line} --format json") == 0
    return json.loads(capsys.readouterr().out)


def run(line, **settings):
    """Run the installed command in a process of its own."""
    command = Path(sysconfig.get_path("scripts")) / "hatnet-analysis"
    settings = {"stdout": subprocess.PIPE, **settings}
    return subprocess.run([command, *line.split()], stderr=subprocess.PIPE, text=True, encoding="utf-8", **settings)


@pytest.mark.parametrize(("line", "expected"), [*((wrong, 2) for wrong in USAGE), *((bad, 1) for bad in FAILURES)])
def test_bad_input_is_named_with_an_exit_status_and_leaves_nothing(line, expected, files, capsys):
    line, *named = line
    before = sorted(files.iterdir())
    assert status(line) == expected
    out, err = capsys.readouterr()
    assert out == ""
    if expected == 2:
        usage_error(err, *named)
    else:
        error_line(err, f"hatnet-analysis {line.split()[0]}", *named)
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("line", SMALL)
@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("can't allocate memory\nframe #0"), "can't allocate memory"),
        (MemoryError(), "MemoryError"),
        (TypeError("int() of a list"), "TypeError: int() of a list"),
    ],
)
def test_any_error_is_one_line(line, error, named, files, capsys, monkeypatch):
    def fails(*arguments, **keywords):
        raise error

    monkeypatch.setattr(f"hatnet_analysis.{SMALL[line]}", fails)
    assert status(line) == 1
    out, err = capsys.readouterr()
    assert out == ""
    error_line(err, f"hatnet-analysis {line.split()[0]}", named)
    assert not (files / "page").exists()


@pytest.mark.parametrize("line", SMALL)
def test_a_closed_reader_ends_the_command_silently(line, files, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody:  # noqa: PTH123  # a descriptor; Python flushes it at the end
        monkeypatch.setattr(sys, "stdout", nobody)
        assert status(line) == 141
    assert "error" not in capfd.readouterr().err


def test_the_installed_command_prints_rows_and_logs_progress():
    done = run("flops hatnet_tiny --size 32 48 --format json", check=True)
    check(done.stderr, "hatnet-analysis flops", TINY, "32×48")
    total = count_flops(create_model(TINY), 32, 48).total
    expected = {"model": TINY, "height": 32, "width": 48}
    assert json.loads(done.stdout) == [{**expected, "flops_paper": total.paper, "flops_complete": total.complete}]


def test_quiet_logs_no_progress(capsys):
    assert status("flops hatnet_tiny --size 32 --quiet") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="needs MMDetection")
def test_the_libraries_of_dense_tasks_add_nothing_to_the_output():
    done = run("params retinanet_hatnet-t_fpn_1x_coco --format json", check=True)
    assert done.stderr == ""
    assert [row["model"] for row in json.loads(done.stdout)] == ["retinanet_hatnet-t_fpn_1x_coco"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = run("params hatnet_tiny", stdout=full, check=False)
    assert done.returncode == 1
    error_line(done.stderr, "hatnet-analysis params", "standard output")


def test_help_and_wrong_command_lines_import_nothing_slow():
    code = "import sys\nfrom hatnet_analysis.cli import main\n"
    code += "try: main(sys.argv[1:])\nfinally: print(*sys.modules)"
    for line in ("flops --help", "--help", "flops hatnet_tiny --size 16"):
        done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=False)
        assert not {"torch", "matplotlib", "fvcore", "PIL"} & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_the_program_lists_its_commands(command, capsys):
    name = command.__name__.lower()
    assert status(f"{name} --help") == 0
    assert f"Examples:\n  hatnet-analysis {name} " in capsys.readouterr().out
    assert status("--help") == 0
    assert f" {name} " in capsys.readouterr().out


def test_version_is_that_of_the_package(capsys):
    assert status("--version") == 0
    assert capsys.readouterr().out == f"hatnet-analysis {__version__}\n"


@pytest.mark.parametrize("style", ["table", "markdown", "json"])
def test_an_ascii_output_gets_question_marks_and_json_escapes(style, monkeypatch):
    row = {"model": TINY, "stages": "C48 ×2, 14²"}
    monkeypatch.setattr("hatnet_analysis.paper.table_rows", lambda *arguments: [row])
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert status(f"paper --table 1 --format {style}") == 0
    written = output.buffer.getvalue().decode("ascii")
    assert json.loads(written) == [row] if style == "json" else "C48 ?2, 14?" in written


def test_params_lists_every_model_asked_for_in_order(capsys):
    rows = printed(f"params {' '.join(reversed(list_models()))}", capsys)
    assert [row["model"] for row in rows] == ["hatnet_large", "hatnet_medium", "hatnet_small", TINY]
    assert [round(row["params"] / 1e6, 1) for row in rows] == [63.1, 42.9, 25.7, 12.7]  # Table 1


def test_params_by_block_add_up_to_the_model(capsys):
    rows = printed("params hatnet_tiny --by block", capsys)
    assert "stages.2.blocks.5" in [row["part"] for row in rows]
    assert sum(row["params"] for row in rows) == 12_650_152


def test_a_table_is_for_reading_in_millions(capsys):
    main(["params", TINY])
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading.endswith("params (M)")
    assert row.split() == [TINY, "12.65"]


def test_markdown_is_a_table_of_github(capsys):
    main(["flops", TINY, "--size", "32", "--format", "markdown"])
    heading, rule, row = capsys.readouterr().out.splitlines()
    assert heading.count("|") == row.count("|") == 6
    assert set(rule) <= set("|-:")


@pytest.mark.parametrize(
    ("by", "parts"),
    [
        ("stage", ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]),
        ("operator", ["conv", "group_norm", "attention", "linear"]),
    ],
)
def test_flops_can_be_asked_for_by_part(by, parts, capsys):
    rows = printed(f"flops hatnet_tiny --size 32 --by {by}", capsys)
    assert [row["part"] for row in rows] == parts
    assert sum(row["flops_complete"] for row in rows) == count_flops(create_model(TINY), 32, 32).total.complete


def test_complexity_of_a_stage_is_compared_with_the_equations(capsys):
    rows = printed("complexity hatnet_tiny", capsys)
    assert rows[0]["h_mhsa_macs"] == 63_146_496
    assert all(row["measured_macs"] == row["h_mhsa_macs"] and row["verdict"] == "equal" for row in rows)


def test_growth_is_three_tables_a_picture_and_one_json(capsys, files):
    assert status("growth --sizes 64 128 --out growth.png") == 0
    assert capsys.readouterr().out.count("H-MHSA") >= 3
    assert (files / "growth.png").read_bytes().startswith(b"\x89PNG")
    (record,) = printed("complexity --growth --sizes 64 128", capsys)
    assert record.keys() == {"growth", "exponents", "crossings"}


def test_attention_is_drawn_and_listed(capsys, files):
    line = "attention image.png --variant hatnet_tiny --point 200 40"
    assert status(f"{line} --stage 3 --head 1 --out seen.png") == 0
    out, err = capsys.readouterr()
    assert "global (pooled)" in out
    check(err, "warning", "hatnet_tiny", "Random", "--checkpoint", "--pretrained")
    assert (files / "seen.png").read_bytes().startswith(b"\x89PNG")
    (record,) = printed(line, capsys)
    assert (record["row"], record["column"]) == (8, 43)  # of 56×56, the image being 256×256


@pytest.mark.parametrize(("more", "expected"), [("", [64, 64]), ("--size 32 96", [32, 96])])
def test_the_attention_of_a_checkpoint_is_at_the_size_of_its_training(more, expected, capsys, files):
    save_checkpoint(create_model(TINY, num_classes=2), files / "own.safetensors", {"image_size": 64})
    (record,) = printed(f"attention image.png --checkpoint own.safetensors --point 200 40 {more}", capsys)
    assert record["input_size"] == expected


def test_the_weights_of_a_checkpoint_are_not_called_random(capsys, files):
    save_checkpoint(create_model(TINY, num_classes=2), files / "own.safetensors", {"image_size": 64})
    assert status("attention image.png --checkpoint own.safetensors --point 200 40") == 0
    assert "andom" not in capsys.readouterr().err


def test_pretrained_weights_are_looked_for_where_they_are_published(capsys, files, monkeypatch):
    monkeypatch.setenv("HATNET_WEIGHTS_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(files / "hub"))
    assert status("attention image.png --variant hatnet_tiny --pretrained --point 200 40") == 1
    error_line(capsys.readouterr().err, "hatnet-analysis attention", "127.0.0.1:9", "HAT-Net_Tiny.pth")


def test_a_checkpoint_is_compared_with_the_top1_that_it_records(capsys, files):
    save_checkpoint(create_model(TINY, num_classes=2), files / "own.safetensors", {"top1": 81.25})
    options = "--checkpoint own.safetensors --size 32 --batch 1 --rounds 1"
    named, own = printed(f"compare hatnet_tiny {options}", capsys)
    assert (named["model"], named["own_top1"]) == ("hatnet_tiny", None)
    assert (own["model"], own["own_top1"], own["paper_top1"]) == ("own.safetensors", 81.25, None)
    assert own["params"] < named["params"]  # two classes
    (files / "foreign.pth").write_bytes(b"")
    assert status("compare hatnet_tiny --checkpoint foreign.pth") == 1
    error_line(capsys.readouterr().err, "hatnet-analysis compare", "foreign.pth")


def test_throughput_of_two_models_is_a_ratio_and_logs_their_turns(capsys):
    assert status("throughput hatnet_tiny timm/resnet18 --size 32 --batch 1 --rounds 1") == 0
    out, err = capsys.readouterr()
    assert "ratio" in out.splitlines()[0]
    assert out.splitlines()[2].split()[-1] == "1.00"
    check(err, "hatnet-analysis throughput", "timm/resnet18")
