"""What every command does alike, tried on a small one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hatnet_core.commands import (
    CLOSED,
    Parser,
    UsageError,
    add_batch,
    add_checkpoint,
    add_device,
    add_format,
    add_size,
    add_variant,
    path_ending,
    pick_device,
    real,
    say,
    some_path,
    writable_file,
    writable_folder,
)


@pytest.fixture
def parser():
    """One subcommand that has the shared options."""
    made = Parser("toy", description="A toy.", version="1.2")
    commands = made.add_subparsers(required=True, metavar="COMMAND")
    add_checkpoint(commands.add_parser("work"), required=True)
    play = commands.add_parser("play", description="Play.\n\n  as it is")
    add_variant(play, "")
    add_size(play, (224, 224), 4096)
    add_device(play)
    add_batch(play, 8)
    add_format(play)
    play.add_argument("--share", type=real(0, 1))
    play.add_argument("--seconds", type=real(0))
    play.add_argument("--out", type=path_ending(".png", ".svg"))
    play.add_argument("--folder", type=some_path)
    return made


@pytest.fixture
def run(parser, capsys):
    """Exit status and the lines on standard error of the command, which does ``work``."""

    def run(*arguments, work=lambda options: None):
        try:
            status = parser.run(work, [str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err.splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "toy: error: the following arguments are required: COMMAND (see toy --help)"),
        (["plya"], "argument COMMAND: invalid choice: 'plya', did you mean play? (choose from work, play)"),
        (
            ["play", "--sise", "64"],
            "toy play: error: unknown argument '--sise', did you mean --size? (see toy play --h",
        ),
        (["play", "--sise=64"], "unknown argument '--sise=64', did you mean --size?"),
        (
            ["work", "--checkpiont", "a"],
            "toy work: error: unknown argument '--checkpiont', did you mean --checkpoint?",
        ),
        (["work"], "toy work: error: the following arguments are required: --checkpoint"),
        (["play", "more"], "toy play: error: unknown argument 'more' (see toy play --help)"),
        (["play", "--form", "json"], "unknown argument '--form', did you mean --format?"),
        (
            ["play", "--variant", "hatnet-smal"],
            "'hatnet-smal', did you mean hatnet_small? (choose from hatnet_tiny, h",
        ),
        (["play", "--size", "16"], "argument --size: '16' is not a whole number of pixels from 32 to 4096"),
        (["play", "--size", "-64"], "argument --size: '-64' is not a whole number of pixels"),
        (["play", "--size", "64", "2²"], "'2²' is not a whole number of pixels"),
        (["play", "--size", "64", "64", "64"], "argument --size: expected one number or two, got 64 64 64"),
        (["play", "--batch", "0"], "argument --batch: '0' is not a whole number from 1 up"),
        (["play", "--batch", "1_0"], "argument --batch: '1_0' is not a whole number from 1 up"),
        (["play", "--format", "xml"], "argument --format: invalid choice: 'xml' (choose from table, json)"),
        (["play", "--share", "1.5"], "argument --share: '1.5' is not a number from 0 to 1"),
        (["play", "--share", "nan"], "argument --share: 'nan' is not a number from 0 to 1"),
        (["play", "--seconds", "0"], "argument --seconds: '0' is not a number above 0"),
        (["play", "--seconds", "inf"], "argument --seconds: 'inf' is not a number above 0"),
        (["play", "--seconds", "soon"], "argument --seconds: 'soon' is not a number above 0"),
        (["play", "--out", "a.gif"], "argument --out: 'a.gif' does not end in .png or .svg"),
        (["play", "--folder", ""], "argument --folder: '' is no path"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments, message, run):
    status, (line,) = run(*arguments)
    assert status == 2
    assert message in line
    assert line.endswith(" --help)")


@pytest.mark.parametrize(("numbers", "size"), [(["64"], (64, 64)), (["64", "96"], (64, 96)), ([], (224, 224))])
def test_a_size_is_one_number_or_two(numbers, size, parser):
    options = parser.parsed(["play", *(["--size", *numbers] if numbers else [])])
    assert options.size == size


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("two\n lines"), 1, "toy play: error: two lines"),
        (FileNotFoundError(2, "No such file or directory", "a.png"), 1, "toy play: error: a.png: No such file or dir"),
        (OSError(28, "No space left on device"), 1, "toy play: error: No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), 1, "toy play: error: Broken pipe"),  # not of standard output
        (KeyError("neck"), 1, "toy play: error: KeyError: 'neck' (HATNET_TRACEBACK=1 shows where it comes from)"),
        (MemoryError(), 1, "toy play: error: MemoryError (HATNET_TRACEBACK=1 shows where it comes from)"),
        (UsageError("--a and --b"), 2, "toy play: error: --a and --b (see toy play --help)"),
        (KeyboardInterrupt(), 130, "toy play: interrupted"),
    ],
)
def test_whatever_ends_a_command_is_one_line_and_a_status(error, status, line, run):
    def fail(options):
        raise error

    ended, (said,) = run("play", work=fail)
    assert ended == status
    assert said.startswith(line)


def test_a_variable_shows_where_an_error_comes_from(run, monkeypatch):
    monkeypatch.setenv("HATNET_TRACEBACK", "1")

    def fail(options):
        raise ValueError("no")

    status, lines = run("play", work=fail)
    assert status == 1
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "toy play: error: no"


@pytest.mark.parametrize("arguments", [["--help"], ["play", "--help"], ["--version"], ["play"]])
def test_a_reader_that_went_away_ends_the_command_without_a_word(arguments, parser, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody:  # noqa: PTH123  # a descriptor; Python flushes it at the end
        monkeypatch.setattr(sys, "stdout", nobody)
        assert parser.run(lambda options: say("x" * 100_000), arguments) == 141
    assert capfd.readouterr().err == ""


def test_a_help_fits_80_columns_and_says_what_a_command_is_for(parser, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parser.parsed(["play", "--help"])
    text = capsys.readouterr().out
    assert "Play.\n\n  as it is\n" in text
    assert "--size H [W]" in text
    assert max(map(len, text.splitlines())) <= 80


def test_files_and_folders_to_write_are_checked_before_the_work(tmp_path):
    assert writable_file(tmp_path / "a.json") == tmp_path / "a.json"
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    for path in (tmp_path, tmp_path / "no" / "a.json"):
        with pytest.raises(ValueError, match=rf"^--out must be a file in a folder that exists .*, got '{path}'$"):
            writable_file(path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=rf"^--dir must be a folder that can be made and written, got '{path}'$"):
            writable_folder(path, "--dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="--out must be a file"):
        writable_file(tmp_path / "closed" / "a.json")
    with pytest.raises(ValueError, match="--out must be a folder"):
        writable_folder(tmp_path / "closed" / "a")


def test_auto_is_a_device_that_is_there():
    assert torch.zeros(1, device=pick_device("auto")).item() == 0
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=f"device must be auto, cpu, or a GPU that is there .*, got '{name}'") as no:
        pick_device(name)
    assert len(str(no.value).splitlines()) == 1
    assert len(str(no.value)) < 200


def test_with_a_closed_standard_output_argparse_speaks_on_the_other():
    command = f"{Path(sys.executable).with_name('hatnet-export')} --version >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("hatnet-export ")
    assert done.stderr.count("\n") == 1


def test_who_prints_nothing_may_have_no_standard_output(parser, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert parser.run(lambda options: None, ["play"]) == 0
    assert parser.run(lambda options: say("text"), ["play"]) == CLOSED
