"""The common part of all commands, tried on one with two subcommands."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import torch
from tyro.conf import Positional

from hatnet_core.console import (
    CLOSED,
    BadImages,
    Batch,
    Command,
    Format,
    OptionalCheckpoint,
    SomePath,
    UsageError,
    Variant,
    file_ending,
    pixels,
    real,
    run,
    say,
    whole,
    writable_file,
    writable_folder,
)
from hatnet_core.devices import pick_device
from hatnet_testing import error_line, raises, usage_error

logger = logging.getLogger("hatnet_core")


@dataclass(frozen=True, kw_only=True)
class Work(Command):
    """Work."""

    checkpoint: Annotated[str, "required"]
    """Weights."""

    def run(self):
        """Work."""


@dataclass(frozen=True, kw_only=True)
class Play(BadImages, Command):
    """Play.

    Examples:
      toy play --size 64
    """

    paths: Positional[tuple[SomePath, ...]] = ()
    checkpoint: OptionalCheckpoint = None
    variant: Variant = None
    batch: Batch = 8
    format: Format = "table"
    size: Annotated[tuple[int, int], pixels(4096)] = (224, 224)
    share: Annotated[float, real(0, 1)] = 0.5
    seconds: Annotated[float, real(0)] = 1.0
    top_k: Annotated[int | None, whole(1)] = None
    out: Annotated[Path | None, file_ending(".png", ".svg")] = None

    def run(self):
        """Play."""
        return PLAYED(self)


PLAYED = print


@pytest.fixture
def toy(capsys, monkeypatch):
    """Run the command; returns its status, standard output and standard error."""

    def started(*arguments, work=lambda options: None):
        monkeypatch.setitem(globals(), "PLAYED", work)
        try:
            status = run("toy", {"work": Work, "play": Play}, arguments, version="1.2")
        except SystemExit as end:
            status = end.code
        return (status, *capsys.readouterr())

    return started


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["work", "play"]),
        (["plya"], ["plya", "work", "play"]),
        (["play", "--sise", "64"], ["--sise", "--size"]),
        (["play", "--sise=64"], ["--sise=64"]),
        (["work", "--checkpiont", "a"], ["--checkpoint"]),
        (["work"], ["--checkpoint"]),
        (["play", "--form", "json"], ["--form", "--format"]),
        (["play", "--variant", "hatnet-smal"], ["--variant", "'hatnet-smal'", "hatnet_small?"]),
        (["play", "--size", "16"], ["--size", "'16'", 32, 4096]),
        (["play", "--size", "-64"], ["--size"]),
        (["play", "--size", "64", "2²"], ["--size", "'2²'"]),
        (["play", "--size", "64", "64", "64"], ["--size", "'64 64 64'"]),
        (["play", "--size"], ["--size", "''"]),
        (["play", "--batch", "0"], ["--batch", "'0'", 1]),
        (["play", "--batch", "1_0"], ["--batch", "'1_0'"]),
        (["play", "--top_k", "many"], ["--top-k", "'many'"]),
        (["play", "--format", "xml"], ["--format", "'xml'", "'table'", "'json'"]),
        (["play", "--share", "1.5"], ["--share", "'1.5'"]),
        (["play", "--share", "nan"], ["--share", "'nan'"]),
        (["play", "--seconds", "0"], ["--seconds", "'0'"]),
        (["play", "--seconds", "inf"], ["--seconds", "'inf'"]),
        (["play", "--seconds", "soon"], ["--seconds", "'soon'"]),
        (["play", "--out", "a.gif"], ["--out", "'a.gif'", ".png", ".svg"]),
        (["play", "--checkpoint", ""], ["--checkpoint", "''"]),
        (["play", "--quiet", "--verbose"], ["--quiet", "--verbose"]),
    ],
)
def test_a_wrong_command_line_is_answered_with_status_2(arguments, named, toy):
    status, out, error = toy(*arguments)
    assert (status, out) == (2, "")
    usage_error(error, *named)


@pytest.mark.parametrize(("numbers", "size"), [(["64"], (64, 64)), (["64", "96"], (64, 96)), ([], (224, 224))])
def test_a_size_is_one_number_or_two(numbers, size, toy):
    sizes = []
    toy("play", *(["--size", *numbers] if numbers else []), work=lambda options: sizes.append(options.size))
    assert sizes == [size]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ValueError("two\n lines"), ["two lines"]),
        (ValueError("top_k must be at most 3, got 7"), ["--top-k", 3, 7]),
        (ValueError("expected variant='hatnet_tiny'"), ["--variant hatnet_tiny"]),
        (FileNotFoundError(2, "No such file or directory", "a.png"), ["a.png"]),
        (OSError(28, "No space left on device"), ["No space left on device"]),
        (BrokenPipeError(32, "Broken pipe"), ["Broken pipe"]),  # not of standard output
        (KeyError("neck"), ["KeyError", "'neck'", "--verbose"]),
        (MemoryError(), ["MemoryError"]),
    ],
)
def test_an_error_is_one_line_and_status_1(error, named, toy):
    def fail(options):
        raise error

    status, _, said = toy("play", work=fail)
    assert status == 1
    assert error_line(said, "toy play", *named) == said.strip()


def test_contradicting_options_are_one_line_and_status_2_and_ctrl_c_is_130(toy):
    def fail(error):
        def work(options):
            raise error

        return work

    status, _, said = toy("play", work=fail(UsageError("--a and --b")))
    assert status == 2
    error_line(said, "toy play", "--a and --b")
    assert toy("play", work=fail(KeyboardInterrupt()))[0] == 130


@pytest.mark.parametrize(("words", "variable"), [(["--verbose"], ""), ([], "1")])
def test_a_traceback_is_shown_on_request(words, variable, toy, monkeypatch):
    monkeypatch.setenv("HATNET_TRACEBACK", variable)

    def fail(options):
        raise ValueError("no")

    status, _, said = toy("play", *words, work=fail)
    assert status == 1
    assert said.startswith("Traceback (most recent call last):")
    error_line(said, "toy play", "no")


@pytest.mark.parametrize(
    ("words", "rank", "levels"),
    [
        ([], "0", ["info", "warning", "error"]),
        (["--quiet"], "0", ["warning", "error"]),
        (["--verbose"], "0", ["debug", "info", "warning", "error"]),
        ([], "1", ["error"]),
    ],
)
def test_messages_carry_the_command_and_those_of_rank_0_are_shown(words, rank, levels, toy, monkeypatch):
    monkeypatch.setenv("RANK", rank)

    def log(options):
        for level in ("debug", "info", "warning"):
            getattr(logger, level)("%s", level)
        logger.error("error", extra={"all_ranks": True})

    _, _, said = toy("play", *words, work=log)
    assert [line.rpartition(" ")[2] for line in said.splitlines()] == levels
    assert all(line.startswith("toy play: ") for line in said.splitlines())
    assert not logger.handlers


@pytest.mark.parametrize(("words", "images", "status"), [([], 3, 1), (["replace"], 3, 0), (["replace"], 1, 1)])
def test_images_that_are_skipped_are_named_and_counted(words, images, status, toy):
    def work(options):
        options.skip("cannot read a.png")
        return options.finish(images)

    flag = ["--on-bad-image", *words] if words else []
    ended, _, said = toy("play", *flag, work=work)
    assert ended == status
    assert "a.png" in said.splitlines()[0]
    assert said.count(f"1 of {images}") == status


@pytest.mark.parametrize("arguments", [["--help"], ["play", "--help"], ["--version"], ["play"]])
def test_a_reader_that_is_gone_ends_the_command_silently(arguments, capfd, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as nobody:  # noqa: PTH123  # a descriptor; Python flushes it at the end
        monkeypatch.setattr(sys, "stdout", nobody)
        monkeypatch.setitem(globals(), "PLAYED", lambda options: say("x" * 100_000))
        assert run("toy", {"work": Work, "play": Play}, arguments, version="1.2") == CLOSED
    assert capfd.readouterr().err == ""


def test_a_help_fits_80_columns_and_shows_the_description_with_its_examples(toy, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, text, _ = toy("play", "--help")
    assert status == 0
    assert "Play.\n\nExamples:\n  toy play --size 64\n" in text
    assert "--size H [W]" in text
    assert all(len(line) <= 80 for line in text.splitlines() if re.match(r"[│ ]+--", line))


def test_files_and_folders_to_write_are_checked_before_the_work(tmp_path):
    assert writable_file(tmp_path / "a.json") == tmp_path / "a.json"
    assert writable_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    for path in (tmp_path, tmp_path / "no" / "a.json"):
        with raises(ValueError, "--out", f"'{path}'"):
            writable_file(path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with raises(ValueError, "--dir", f"'{path}'"):
            writable_folder(path, "--dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with raises(ValueError, "--out", tmp_path / "closed" / "a.json"):
        writable_file(tmp_path / "closed" / "a.json")
    with raises(ValueError, "--out", tmp_path / "closed" / "a"):
        writable_folder(tmp_path / "closed" / "a")


def test_auto_is_an_available_device():
    assert torch.zeros(1, device=pick_device("auto")).item() == 0
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", "", "cuda:-1"])
def test_a_missing_device_is_refused(name):
    with raises(ValueError, "device", f"'{name}'", "cuda:0"):
        pick_device(name)


def test_a_closed_standard_output_is_no_error_where_nothing_is_printed(toy, monkeypatch):
    command = f"{Path(sys.executable).with_name('hatnet-export')} --version >&-"
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode in (0, CLOSED)
    monkeypatch.setattr(sys, "stdout", None)
    assert toy("play")[0] == 0
    assert toy("play", work=lambda options: say("text"))[0] == 0


def test_help_imports_no_torch():
    code = "import sys, hatnet_core.console; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
