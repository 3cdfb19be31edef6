"""Runs the blocks of the pages: Python with its namespace, shell commands with their folder, each page from the top.

A block that cannot run here stands behind a comment that says why, ``<!-- skip: next "needs eight GPUs" -->``; the
built page shows the reason. What a page presupposes is prepared in a block that readers do not see,
``<!-- invisible-code-block: shell … -->``. In a block of ``console`` the commands follow ``$``, and the lines behind
them must be what they print; ``...`` stands for anything. Every page has an empty folder of its own.
"""

from __future__ import annotations

import doctest
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from extension import UNMARKED
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

DOCS = Path(__file__).parent

TIMEOUT = 300
"""Seconds that the commands of one block may take."""

collect_ignore = ["_build"]
"""The site holds copies of files that its pages link to."""

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def pytest_configure(config: pytest.Config) -> None:
    """Ignore a warning of transformers about how PEFT uses it."""
    config.addinivalue_line("filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def run(commands: str) -> str:
    """Run ``commands`` in bash and return both streams; AssertionError unless all succeed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CHECKOUT": str(DOCS.parent),
        "COLUMNS": "120",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, f"status {done.returncode} of:\n{commands}\n{done.stdout}"
    return done.stdout


def evaluate_shell(example: Example) -> None:
    """Run a block of commands."""
    run(str(example.parsed))


def evaluate_console(example: Example) -> str | None:
    """Run commands one by one; a message if one prints something else than the lines behind it."""
    for step in f"\n{example.parsed}".split("\n$ ")[1:]:
        command, _, expected = step.partition("\n")
        printed = run(command)
        wanted = doctest.Example(command, expected.rstrip() + "\n")
        checker = doctest.OutputChecker()
        if expected.strip() and not checker.check_output(wanted.want, printed, OPTIONS):
            return f"{command}\n{checker.output_difference(wanted, printed, OPTIONS)}"
    return None


def open_folder(namespace: dict[str, Any]) -> None:
    """Enter an empty folder, in which the blocks of a page run."""
    namespace["folder"] = TemporaryDirectory(prefix="hatnet-docs-")
    os.chdir(namespace["folder"].name)


def close_folder(namespace: dict[str, Any]) -> None:
    """Leave it and remove it."""
    os.chdir(DOCS.parent)
    namespace["folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[
        SkipParser(),
        PythonCodeBlockParser(doctest_optionflags=OPTIONS),
        CodeBlockParser("shell", evaluate_shell),
        CodeBlockParser("console", evaluate_console),
    ],
    pattern="*.md",
    excludes=[f"{pages}.md" for pages in UNMARKED],
    setup=open_folder,
    teardown=close_folder,
).pytest()
