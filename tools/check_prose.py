"""Check the English that a script can check: first words of docstrings, and words with a plainer equivalent.

``nox -s lint`` runs it. Words count as whole words and outside of code spans.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OPENINGS = ("What", "Whether", "How", "Where", "Who", "Which")

WORDS = {
    r"beside": "compared with, next to",
    r"likewise": "repeat the sentence, or refer to it",
    r"mend(s|ed|ing)?": "fix",
    r"dearer|cheaper": "slower, faster, costs more, costs less",
    r"go(es)? on from|gone on from": "resume",
    r"(leaves?|left|leaving) out": "skip, omit, exclude",
    r"by itself|as it comes": "automatically, unchanged",
    r"does not pay": "does not help",
    r"says? so": "report, raise, log",
    r"(images|bits|steps|workers) an? (second|channel|step|process)": "images per second",
}
"""Patterns of what not to write, and what to write instead."""


def problems(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and problem of everything to rewrite in a file."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "-").split()[0].strip(",")
                if first in OPENINGS:
                    problem = f"a docstring must open with an imperative verb or a noun phrase, got {first!r}"
                    yield node.body[0].lineno, problem
    for number, line in enumerate(text.splitlines(), 1):
        prose = re.sub(r"`[^`]*`", "", line)
        for pattern, instead in WORDS.items():
            if (found := re.search(rf"\b({pattern})\b", prose)) and "# prose: " not in line:
                yield number, f"{found[0]!r}: write {instead}"


def main() -> None:
    """Print every problem in the tracked files under the paths of the command line, and fail if there is one."""
    listed = subprocess.run(["git", "ls-files", "--", *sys.argv[1:]], check=True, capture_output=True, text=True)
    files = [Path(name) for name in listed.stdout.splitlines() if name.endswith((".py", ".md"))]
    found = [f"{file}:{line}: {problem}" for file in files for line, problem in problems(file)]
    sys.exit("\n".join(found) if found else 0)


if __name__ == "__main__":
    main()
