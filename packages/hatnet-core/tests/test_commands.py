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
from hatnet_testing import error_line, raises, usage_error


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
    """Exit status and standard error of the command, which does ``work``."""

    def run(*arguments, work=lambda options: None):
        try:
            status = parser.run(work, [str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", ["COMMAND"]),
        ("plya", ["plya", "play"]),
        ("play --sise 64", ["--sise", "--size"]),
        ("play --sise=64", ["--sise", "--size"]),
        ("work --checkpiont a", ["--checkpiont", "--checkpoint"]),
        ("work", ["--checkpoint"]),
        ("play more", ["more"]),
        ("play --form json", ["--form", "--format"]),
        ("play --variant hatnet-smal", ["hatnet-smal", "hatnet_small"]),
        ("play --size 16", ["--size", 16, 32, 4096]),
        ("play --size -64", ["--size", -64, 32, 4096]),
        ("play --size 64 2²", ["--size", "2²"]),
        ("play --size 64 64 64", ["--size", "64 64 64"]),
        ("play --batch 0", ["--batch", 0]),
        ("play --batch 1_0", ["--batch", "1_0"]),
        ("play --format xml", ["--format", "xml", "table", "json"]),
        ("play --share 1.5", ["--share", 1.5]),
        ("play --share nan", ["--share", "nan"]),
        ("play --seconds 0", ["--seconds", 0]),
        ("play --seconds inf", ["--seconds", "inf"]),
        ("play --seconds soon", ["--seconds", "soon"]),
        ("play --out a.gif", ["--out", "a.gif", ".png", ".svg"]),
        ("play --folder=", ["--folder"]),
    ],
)
def test_a_wrong_command_line_is_status_2_and_names_what_is_wrong(line, named, run):
    status, said = run(*line.split())
    assert status == 2
    usage_error(said, "--help", *named)


@pytest.mark.parametrize(("numbers", "size"), [(["64"], (64, 64)), (["64", "96"], (64, 96)), ([], (224, 224))])
def test_a_size_is_one_number_or_two(numbers, size, parser):
    options = parser.parsed(["play", *(["--size", *numbers] if numbers else [])])
    assert options.size == size


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ValueError("two\n lines"), ["two lines"]),
        (FileNotFoundError(2, "No such file or directory", "a.png"), ["a.png", "No such file or directory"]),
        (OSError(28, "No space left on device"), ["No space left on device"]),
        (BrokenPipeError(32, "Broken pipe"), ["Broken pipe"]),  # not of standard output
        (KeyError("neck"), ["KeyError", "neck", "HATNET_TRACEBACK"]),
        (MemoryError(), ["MemoryError", "HATNET_TRACEBACK"]),
    ],
)
def test_an_error_of_the_work_is_one_line_and_status_1(error, named, run):
    status, said = run("play", work=raising(error))
    assert status == 1
    assert said == error_line(said, "toy play", *named) + "\n"


def raising(error):
    def work(options):
        raise error

    return work


def test_other_ends_of_the_work_have_their_own_status(run):
    status, said = run("play", work=raising(UsageError("--a and --b")))
    assert status == 2
    usage_error(said, "--a", "--b")
    status, said = run("play", work=raising(KeyboardInterrupt()))
    assert status == 130
    assert len(said.splitlines()) == 1


def test_a_variable_shows_where_an_error_comes_from(run, monkeypatch):
    monkeypatch.setenv("HATNET_TRACEBACK", "1")
    status, said = run("play", work=raising(ValueError("no")))
    assert status == 1
    assert said.startswith("Traceback (most recent call last):\n")
    error_line(said, "toy play", "no")


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
    assert "Play." in text
    assert "--size" in text
    assert max(map(len, text.splitlines())) <= 80


def test_files_and_folders_to_write_are_checked_before_the_work(tmp_path):
    assert writable_file(tmp_path / "a.json") == tmp_path / "a.json"
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    for path in (tmp_path, tmp_path / "no" / "a.json"):
        with raises(ValueError, "--out", path):
            writable_file(path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with raises(ValueError, "--dir", path):
            writable_folder(path, "--dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with raises(ValueError, "--out", tmp_path / "closed" / "a.json"):
        writable_file(tmp_path / "closed" / "a.json")
    with raises(ValueError, "--out", tmp_path / "closed" / "a"):
        writable_folder(tmp_path / "closed" / "a")


def test_auto_is_a_device_that_is_there():
    assert torch.zeros(1, device=pick_device("auto")).item() == 0
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name):
    with raises(ValueError, "device", f"'{name}'") as no:
        pick_device(name)
    assert len(str(no.value).splitlines()) == 1
    assert len(str(no.value)) < 200


def test_a_closed_standard_output_is_not_an_error():
    command = f"{Path(sys.executable).with_name('hatnet-export')} --version >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr


def test_who_prints_nothing_may_have_no_standard_output(parser, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert parser.run(lambda options: None, ["play"]) == 0
    assert parser.run(lambda options: say("text"), ["play"]) == CLOSED
