"""What is built of a package: that sdist and wheel hold what they should, and that the wheel works where it is put.

``files`` compares the distributions with the checkout; ``works`` runs in an environment that holds the wheel, in an
empty folder. Both are called by ``nox -s wheels`` and need the standard library alone; what is wrong is one line.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import importlib.metadata
import importlib.util
import io
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from email import message_from_bytes
from pathlib import Path
from typing import NoReturn

Files = dict[str, bytes]
"""Content by name, in a wheel or sdist."""


def check_files(package: str, folder: Path) -> None:
    """Check the one sdist, and the wheels in ``from-sdist`` and ``from-checkout``, that ``folder`` holds."""
    source = Path("packages", package)
    module = package.replace("-", "_")
    wheel, again = (_wheel(folder / origin) for origin in ("from-sdist", "from-checkout"))
    sdist = _sdist(folder / "from-sdist")
    tracked = _tracked(source)
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    _same(f"the wheel of {package} and the one built from its sdist", wheel, again)
    info = next(name.partition("/")[0] for name in wheel if ".dist-info/" in name)
    expected = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    if project.get("scripts"):
        expected.add(f"{info}/entry_points.txt")
    expected |= {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    _listed(f"the wheel of {package}", set(wheel), expected)
    kept = {name for name in tracked if not name.startswith("changes/")}
    _listed(f"the sdist of {package}", set(sdist), kept | {"PKG-INFO", ".gitignore"})
    if f"{module}/py.typed" not in wheel:
        fail(f"the wheel of {package} lacks {module}/py.typed, and type checkers would ignore its types")
    for kind, files in (("wheel", wheel), ("sdist", sdist)):
        for name, content in files.items():
            if str(Path.cwd()).encode() in content:
                fail(f"{name} in the {kind} of {package} holds the path of this checkout")
    metadata = message_from_bytes(wheel[f"{info}/METADATA"])
    for field, value in {"Name": package, "License-Expression": project["license"], "License-File": "LICENSE"}.items():
        if metadata[field] != value:
            fail(f"metadata of {package}: {field} is {metadata[field]!r}, expected {value!r}")
    say(f"{info.removesuffix('.dist-info')}: {len(wheel)} files in the wheel, {len(sdist)} in the sdist, none amiss")


def _wheel(folder: Path) -> Files:
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {_inside(name): archive.read(name) for name in archive.namelist()}


def _sdist(folder: Path) -> Files:
    """Names without the folder that all of them lie in."""
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
        contents = [(member.name, archive.extractfile(member)) for member in members]
        return {_inside(name).partition("/")[2]: file.read() for name, file in contents if file is not None}


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        fail(f"{name} would be unpacked outside of the folder that it belongs in")
    return name


def _tracked(source: Path) -> set[str]:
    """The files of a package that git has or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "."]
    listed = subprocess.run(command, cwd=source, capture_output=True, text=True)
    if listed.returncode:
        fail(f"distributions are compared with what git has of {source}: {listed.stderr.strip().splitlines()[-1]}")
    return {name for name in listed.stdout.splitlines() if (source / name).exists()}


def _listed(what: str, found: set[str], expected: set[str]) -> None:
    for verb, names in (("lacks", expected - found), ("should not hold", found - expected)):
        if names:
            fail(f"{what} {verb} {', '.join(sorted(names))}")


def _same(what: str, one: Files, other: Files) -> None:
    differing = [name for name in {*one, *other} if one.get(name) != other.get(name)]
    if differing:
        fail(f"{what} differ in {', '.join(sorted(differing))}")


def check_installed(package: str, readme: Path) -> None:
    """Use an installed package: its modules, all of its commands, and what its README shows of Python."""
    module = importlib.import_module(package.replace("-", "_"))
    if "site-packages" not in str(module.__file__):
        fail(f"{package} is imported from {module.__file__}, expected the wheel that is installed")
    scripts = importlib.metadata.distribution(package).entry_points.select(group="console_scripts")
    for script in scripts if importlib.util.find_spec("tyro") else ():  # an extra of hatnet-core
        ran(script.name, "--help")
        say(f"{script.name} --help: works")
    EXERCISES[package](readme.read_text())


def _core(readme: str) -> None:
    required = [line for line in importlib.metadata.requires("hatnet-core") or [] if "extra ==" not in line]
    if [re.split("[<>=]", line)[0] for line in required] != ["torch"]:
        fail(f"hatnet-core requires {', '.join(required)}: expected torch alone")
    (snippet, *_) = [block for block in blocks(readme) if ">>>" not in block]
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102  the README of this repository
    say("the first snippet of the README: works")


def _train(readme: str) -> None:
    config = ran("hatnet-train", "--recipe", "imagenet", "--data", "synthetic", "--print-config")
    if "hatnet_small" not in config:
        fail(f"hatnet-train --print-config printed no variant: {config[-200:]}")
    say("hatnet-train --print-config: works")


def _dense(readme: str) -> None:
    """Without MMCV, whose operators compile for minutes: the command says what is missing."""
    said = ran("hatnet-dense", "doctor", status=1)
    if not all(name in said for name in ("mmcv", "mmdet", "mmseg", "not ready")) or "Traceback" in said:
        fail(f"hatnet-dense doctor without MMCV: expected what is missing, got {said}")
    say("hatnet-dense doctor: names what is missing")


def _analysis(readme: str) -> None:
    """Without the extras: the examples of the README."""
    examples = "\n".join(block for block in blocks(readme) if ">>>" in block)
    test = doctest.DocTestParser().get_doctest(examples, {}, "README.md", "README.md", 0)
    report = io.StringIO()
    with contextlib.redirect_stdout(report):
        results = doctest.DocTestRunner().run(test)
    if results.failed or not results.attempted:
        fail(f"{results.failed} of {results.attempted} examples of the README fail: {report.getvalue()}")
    say(f"{results.attempted} examples of the README: work")


EXERCISES: dict[str, Callable[[str], None]] = {
    "hatnet-core": _core,
    "hatnet-train": _train,
    "hatnet-dense": _dense,
    "hatnet-analysis": _analysis,
}


def blocks(readme: str) -> list[str]:
    """The Python that a README shows."""
    return re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)


def ran(*command: str, status: int = 0) -> str:
    """What a command of this environment prints; anything but ``status`` is an error."""
    program = Path(sys.executable).with_name(command[0])
    result = subprocess.run([program, *command[1:]], capture_output=True, text=True)
    if result.returncode != status:
        fail(f"{' '.join(command)} ended with {result.returncode}, expected {status}: {result.stderr[-2000:]}")
    return result.stdout + result.stderr


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def fail(text: str) -> NoReturn:
    raise SystemExit(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, argument in (("files", "folder"), ("works", "readme")):
        command = commands.add_parser(name)
        command.add_argument("package", choices=sorted(EXERCISES))
        command.add_argument(argument, type=Path)
    options = parser.parse_args()
    if options.command == "files":
        check_files(options.package, options.folder)
    else:
        check_installed(options.package, options.readme)


if __name__ == "__main__":
    main()
