import json
import subprocess
import sysconfig
from pathlib import Path

import pytest

from hatnet_analysis import __version__, count_flops
from hatnet_analysis.cli import main
from hatnet_core import create_model, list_models

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
    (["compare"], ["'compare'", "'flops'"]),
    ([], ["required: COMMAND"]),
]


def run(*arguments):
    """The installed command in a process of its own."""
    command = Path(sysconfig.get_path("scripts")) / "hatnet-analysis"
    return subprocess.run([command, *arguments], capture_output=True, text=True, encoding="utf-8", check=False)


def test_the_installed_command_counts_and_writes_nothing_else():
    done = run("flops", "hatnet_tiny", "--size", "32", "48", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
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
    assert err.startswith("hatnet-analysis")
    assert err.count("\n") == 1
    assert all(words in err for words in said)


def test_an_image_that_does_not_fit_in_memory_is_one_line_too(capsys, monkeypatch):
    def out_of_memory(*arguments):
        raise RuntimeError("can't allocate memory\nframe #0")

    monkeypatch.setattr("hatnet_analysis.cli.count_flops", out_of_memory)
    with pytest.raises(SystemExit) as exit_:
        main(["flops", "hatnet_tiny", "--size", "65536", "65536"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "cannot run hatnet_tiny at 65536×65536, expected a size that fits: can't allocate memory" in err


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


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    main(["flops", "hatnet_tiny", "--size", "32", "32"])
    assert capsys.readouterr().err == "counting hatnet_tiny at 32×32 ...\n"


@pytest.mark.parametrize("arguments", [["--help"], ["params", "--help"], ["flops", "--help"]])
def test_help_names_what_can_be_asked_for(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for words in ["params", "flops"] if len(arguments) == 1 else ["hatnet_tiny", "hatnet_large", "--format"]:
        assert words in out


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"hatnet-analysis {__version__}\n"
