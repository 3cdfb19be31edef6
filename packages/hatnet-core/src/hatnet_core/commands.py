"""What the commands of all packages share: the form of their options, one line an error, exit statuses, completion.

Nothing here imports torch: ``--help``, a mistyped option and a TAB do not wait for it. What a user sees of this is in
docs/commands.md.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hatnet_core.variants import MIN_SIZE, list_models

if TYPE_CHECKING:
    import torch

FAILED = 1
"""Exit status where what the command line names, or meets on its way, cannot be used."""

USAGE = 2
"""Exit status where the command line itself is wrong: argparse's."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of the signal."""

CLOSED = 141
"""Exit status where whoever read the output went away, likewise."""

STATUSES = (
    "exit status: 0; 1 if something cannot be read, written or done; 2 for a wrong\n"
    "command line; 130 after Ctrl-C; 141 if the reader of the output went away"
)
"""The same for every command, for the end of its help."""

TRACEBACK = "HATNET_TRACEBACK"
"""Environment variable; if it is set, an error shows where it comes from."""

EXPECTED = (ValueError, ImportError, OSError, ArithmeticError)
"""Errors whose messages speak to the user; of any other, the type says more."""

SHARED = {
    "--variant": f"the model: {', '.join(list_models())}, or one of the paper's ablations",
    "--checkpoint": "weights: a run folder of hatnet-train, a checkpoint in it, a .safetensors file, or with "
    "--variant any other file of weights",
    "--size": f"height and width of the image in pixels, from {MIN_SIZE}",
    "--device": "where to compute",
    "--batch": "images that a process computes at a time",
    "--format": "how the result is printed",
    "--out": "write ",
}
"""Options that mean the same wherever they occur, and how their help begins."""

WIDTH = 79
"""Columns of a description; argparse wraps the rest to the terminal."""


class UsageError(ValueError):
    """A command line that contradicts itself, or lacks what it needs: told like what argparse finds."""


class OutputClosedError(Exception):
    """Whoever read standard output went away."""


class Parser(argparse.ArgumentParser):
    """An argument parser that tells an error in one line, runs the command, and completes in the shell.

    Args:
        prog: name of the command.
        description: paragraphs, which are wrapped; those whose lines begin with two spaces stay as they are.
        epilog: examples, shown as they are.
        version: of the package, for ``--version``; none for a subcommand.
        **settings: other arguments of ``argparse.ArgumentParser``.
    """

    def __init__(
        self, prog: str, *, description: str = "", epilog: str = "", version: str = "", **settings: Any
    ) -> None:
        super().__init__(
            prog,
            description=_wrapped(description),
            epilog=epilog,
            formatter_class=_Formatter,
            allow_abbrev=False,
            **settings,
        )
        self.set_defaults(parser=self)  # a subcommand's own, where there is one
        if version:
            self.add_argument("--version", action="version", version=f"%(prog)s {version}")

    def run(self, work: Callable[[argparse.Namespace], int | None], arguments: Sequence[str] | None = None) -> int:
        """Parse, work, and tell what went wrong.

        Args:
            work: takes the options and returns the exit status, None for 0.
            arguments: those of the process by default.

        Returns:
            The exit status.

        Raises:
            SystemExit: after ``--help``, ``--version`` and wrong command lines.
        """
        parser = self
        try:
            try:
                options = self.parsed(arguments)
                parser = options.parser
                return work(options) or 0
            finally:
                say()  # what argparse wrote, too
        except OutputClosedError:
            return CLOSED
        except KeyboardInterrupt:
            parser.tell("interrupted", kind="")
            return INTERRUPTED
        except UsageError as error:
            parser.error(str(error))
        except Exception as error:  # libraries raise whatever they like
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            parser.tell(parser.explain(error))
            return FAILED

    def parsed(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """The options, with the parser that read them as ``parser``; answers the shell if that asks to complete."""
        if "_ARGCOMPLETE" in os.environ:
            _complete(self)
        options, unknown = self.parse_known_args(arguments)
        if unknown:
            options.parser._refuse(unknown[0])
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a mistyped option is told before what is missing: mostly that is the same."""
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # those know their own
            for word in takewhile(lambda word: word != "--", words):
                if word.startswith("--") and " " not in word and _name(word) not in self._option_string_actions:
                    self._refuse(word)
        return super().parse_known_args(words, namespace)

    def _refuse(self, word: str) -> NoReturn:
        self.error(f"unknown argument {word!r}{did_you_mean(_name(word), self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong with the command line, without the usage, and exit."""
        self.tell(f"{message} (see {self.prog} --help)")
        sys.exit(USAGE)

    def tell(self, message: str, *, kind: str = "error: ") -> None:
        """Write one line to standard error."""
        sys.stderr.write(f"{self.prog}: {kind}{message}\n")
        sys.stderr.flush()

    def explain(self, error: Exception) -> str:
        """An error in one line; of one that is not :data:`EXPECTED`, with its type and how to see more."""
        text = self.in_options(" ".join(str(error).split()))
        if isinstance(error, OSError) and error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if isinstance(error, EXPECTED) and text:
            return text
        return f"{type(error).__name__}: {text}".removesuffix(": ") + f" ({TRACEBACK}=1 shows where it comes from)"

    def in_options(self, text: str) -> str:
        """Spell keyword arguments as this command's options: ``variant=NAME`` as ``--variant NAME``."""

        def option(argument: re.Match[str]) -> str:
            name = "--" + argument[1].replace("_", "-")
            action = self._option_string_actions.get(name)
            if action is None:
                return argument[0]
            return name if action.nargs == 0 else f"{name} {argument[2].strip(chr(39))}"

        return re.sub(r"(?<![^\s(])([a-z_]+)=('[^']*'|[\w.-]+)", option, text)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            alike = did_you_mean(str(value), known)
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{alike} (choose from {', '.join(known)})")


def say(text: str | None = None) -> None:
    """Print to standard output, and have it written: what an output cannot encode becomes question marks.

    Raises:
        OutputClosedError: if nobody reads it.
        OSError: if it cannot be written, such as on a full disk.
    """
    if sys.stdout is None:  # closed before the start
        if text is not None:
            raise OutputClosedError
        return
    try:
        if text is not None:
            encoding = sys.stdout.encoding or "utf-8"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try once more at its end
        if isinstance(error, BrokenPipeError):
            raise OutputClosedError from error
        raise OSError(error.errno, error.strerror, "standard output") from error


def _name(word: str) -> str:
    """The option of a word such as ``--size=64``."""
    return word.partition("=")[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the one of ``known`` that is most alike, empty if none is."""
    alike = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {alike[0]}?" if alike else ""


def add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """``--checkpoint``: the weights to work with."""
    text = SHARED["--checkpoint"]
    parser.add_argument("--checkpoint", type=some_path, required=required, metavar="PATH", help=text)


def add_variant(parser: argparse.ArgumentParser, note: str) -> None:
    """``--variant``: the model, by the name of :func:`hatnet_core.create_model`."""
    known = list_models(ablations=True)
    parser.add_argument("--variant", choices=known, metavar="NAME", help=SHARED["--variant"] + note)


def add_size(parser: argparse.ArgumentParser, default: tuple[int, int] | None, high: int, note: str = "") -> None:
    """``--size``: height and width of an image in pixels; one number is both."""
    shown = "" if default is None else f" (default {' '.join(map(str, dict.fromkeys(default)))})"
    parser.add_argument(
        "--size",
        nargs="+",
        action=_Size,
        type=whole(MIN_SIZE, high, " of pixels"),
        default=default,
        metavar=("H", "W"),
        help=f"{SHARED['--size']} to {high}; one number: both{note}{shown}",
    )


def add_device(parser: argparse.ArgumentParser, note: str = "", default: str | None = "auto") -> None:
    """``--device``: where to compute; see :func:`pick_device`."""
    text = f"{SHARED['--device']}{note}: auto (a GPU if there is one), cpu, cuda or cuda:N (default auto)"
    action = parser.add_argument("--device", default=default, metavar="NAME", help=text)
    action.completer = lambda **_: ["auto", "cpu", "cuda"]  # type: ignore[attr-defined]  # argcomplete's


def add_batch(parser: argparse.ArgumentParser, default: int) -> None:
    """``--batch``: images that a process computes at a time."""
    text = f"{SHARED['--batch']} (default {default})"
    parser.add_argument("--batch", type=whole(1), default=default, metavar="N", help=text)


def add_format(parser: argparse.ArgumentParser, *more: str) -> None:
    """``--format``: how the result is printed."""
    choices = ("table", "json", *more)
    text = f"{SHARED['--format']} (default table)"
    parser.add_argument("--format", choices=choices, default="table", help=text)


def whole(low: int, high: int | None = None, unit: str = "") -> Callable[[str], int]:
    """The type of an option that is a whole number in a range."""
    expected = f"a whole number{unit} from {low} " + ("up" if high is None else f"to {high}")

    def read(text: str) -> int:
        # int() would take "1_0" and " 1", too
        if not (text.isascii() and text.isdigit() and low <= int(text) and (high is None or int(text) <= high)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return int(text)

    return read


def real(low: float, high: float = float("inf")) -> Callable[[str], float]:
    """The type of an option that is a number above ``low``, or between and including two bounds."""
    expected = f"a number above {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (low < value < high or (value in (low, high) and high < float("inf"))):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return read


def some_path(text: str) -> Path:
    """The type of an option that is a path; nothing, such as a variable that is not set, is no path."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path")
    return Path(text)


def path_ending(*endings: str) -> Callable[[str], Path]:
    """The type of an option that is a file whose ending says what is written."""

    def read(text: str) -> Path:
        if Path(text).suffix not in endings:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(endings)}")
        return Path(text)

    return read


def writable_file(path: Path) -> Path:
    """``path``, given as ``--out``, if a file can be written there.

    Raises:
        ValueError: naming the option and the path.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out must be a file in a folder that exists and can be written, got {str(path)!r}")
    return path


def writable_folder(path: Path, option: str = "--out") -> Path:
    """``path``, if it is a folder that can be written, or can be made.

    Raises:
        ValueError: naming the option and the path.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{option} must be a folder that can be made and written, got {str(path)!r}")
    return path


def pick_device(name: str) -> torch.device:
    """The device of a name such as ``cpu`` or ``cuda:1``; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: if torch does not know it, or cannot compute there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        known = "" if reason.startswith("Expected one of") else f": {reason}"  # torch lists all that it ever knew
        raise ValueError(
            f"device must be auto, cpu, or a GPU that is there such as cuda:0, got {name!r}{known}"
        ) from error
    return device


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "H [W]" if isinstance(action, _Size) else super()._format_args(action, default_metavar)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class _Size(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if len(values) > 2:
            raise argparse.ArgumentError(self, f"expected one number or two, got {' '.join(map(str, values))}")
        setattr(namespace, self.dest, (values[0], values[-1]))


def _wrapped(text: str) -> str:
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(
        part if part.startswith("  ") else textwrap.fill(part, WIDTH, break_on_hyphens=False) for part in paragraphs
    )


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell, and exit."""
    try:
        import argcomplete
    except ImportError:
        sys.exit(FAILED)
    argcomplete.autocomplete(parser)
