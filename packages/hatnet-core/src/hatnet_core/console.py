"""Run a command: options by tyro, messages by ``logging``, one line per error, an exit status.

The commands of all packages are :class:`Command` classes, which :func:`run` parses and runs. Nothing here imports
torch, so that ``--help`` and a usage error appear at once. Needs the extra ``hatnet-core[cli]``. What a user sees of
this is in docs/commands.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeAlias

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from hatnet_core.variants import MIN_SIZE, list_models

FAILED = 1
"""Exit status after an error in what a command reads, computes or writes."""

USAGE = 2
"""Exit status after a wrong command line, as tyro and argparse have it."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in a shell: 128 + SIGINT."""

CLOSED = 141
"""Exit status after the reader of standard output is gone, as in a shell: 128 + SIGPIPE."""

TRACEBACK = "HATNET_TRACEBACK"
"""Environment variable that, like ``--verbose``, shows the traceback of an error."""

EXPECTED = (ValueError, ImportError, OSError, ArithmeticError)
"""Errors whose message is enough. Any other is shown with its type."""

PACKAGES = ("hatnet_core", "hatnet_train", "hatnet_dense", "hatnet_analysis")
"""Loggers whose records a command writes to standard error."""

Flag: TypeAlias = Annotated[bool, FlagCreatePairsOff, arg(help_behavior_hint="")]
"""Type of an option without a value."""

MESSAGES = tyro.conf.create_mutex_group(required=False, title="messages")

logger = logging.getLogger(__name__)


class UsageError(ValueError):
    """Options that contradict each other, have no effect, or are missing."""


class OutputClosedError(Exception):
    """The reader of standard output is gone."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """Options of a command as fields; the docstring under a field is its help."""

    quiet: Annotated[Flag, MESSAGES] = False
    """Log warnings and errors only."""

    verbose: Annotated[Flag, MESSAGES] = False
    """Log details, and show the traceback of an error."""

    version: Flag = False
    """Print the version and exit."""

    arguments: ClassVar[tuple[str, ...]] = ()
    """Words of the command line; :func:`run` sets them on the instance, as tyro does not tell which were given."""

    def run(self) -> int | None:
        """Do the work; returns the exit status, None for 0."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BadImages:
    """Base of commands that skip images that cannot be read."""

    on_bad_image: Annotated[
        Literal["strict", "replace"],
        arg(
            help="An image that cannot be read is named and skipped. strict: exit status 1 after all others; "
            "replace: a warning."
        ),
    ] = "strict"

    @functools.cached_property
    def problems(self) -> list[str]:
        """Images that were skipped, and why."""
        return []

    def skip(self, problem: str) -> None:
        """Log an image that is skipped."""
        self.problems.append(problem)
        strict = self.on_bad_image == "strict"
        level, text = (logging.ERROR, "%s") if strict else (logging.WARNING, "skipped: %s")
        logger.log(level, text, problem, extra={"all_ranks": True})

    def finish(self, images: int, bad: int | None = None) -> int:
        """Return the exit status after all images, of which ``bad``, by default those skipped here, are bad."""
        bad = len(self.problems) if bad is None else bad
        if not bad or (self.on_bad_image == "replace" and bad < images):
            return 0
        if images > 1 or self.on_bad_image == "replace":
            logger.error("%d of %d images could not be read or predicted", bad, images)
        return FAILED


def option(
    kind: type, metavar: str, read: Callable[[str], Any], show: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec[Any]:
    """Type of an option of one word, for ``Annotated``: ``read`` raises ValueError on a bad one."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [show(value)],
    )


def several(one: PrimitiveConstructorSpec[Any]) -> PrimitiveConstructorSpec[tuple[Any, ...]]:
    """Type of an option of one or more words, each of the type ``one``."""

    def read(words: list[str]) -> tuple[Any, ...]:
        if not words:
            raise ValueError(f"expected at least one {one.metavar}")
        return tuple(one.instance_from_str([word]) for word in words)

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{one.metavar} [{one.metavar} ...]",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [word for item in value or () for word in one.str_from_instance(item)],
    )


def whole(low: int | None = None, high: int | None = None, metavar: str = "N") -> PrimitiveConstructorSpec[int]:
    """Type of an option that is an integer in a range, in decimal digits only."""
    return option(int, metavar, lambda word: _integer(word, low, high))


def real(low: float = -math.inf, high: float = math.inf) -> PrimitiveConstructorSpec[float]:
    """Type of an option that is a number above ``low``, or between and including two bounds."""
    bounds = f" from {low:g} to {high:g}" if high < math.inf else f" above {low:g}" if low > -math.inf else ""

    def read(word: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(word)
            if not bounds or low < value < high or (value in (low, high) and high < math.inf):
                return value
        raise ValueError(f"expected a number{bounds}, got {word!r}")

    return option(float, "X", read, "{:g}".format)


def pixels(high: int) -> PrimitiveConstructorSpec[Any]:
    """Type of ``--size``: height and width in pixels; one number is both."""

    def read(words: list[str]) -> tuple[int, int]:
        if not 1 <= len(words) <= 2:
            raise ValueError(f"expected one or two numbers of pixels, got {' '.join(words)!r}")
        sides = [_integer(word, MIN_SIZE, high) for word in words]
        return sides[0], sides[-1]

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="H [W]",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: [str(side) for side in dict.fromkeys(value or ())],
    )


def file_ending(*suffixes: str) -> PrimitiveConstructorSpec[Path]:
    """Type of an option that is a file whose suffix sets the format."""

    def read(word: str) -> Path:
        if Path(word).suffix not in suffixes:
            raise ValueError(f"expected a file name that ends in {' or '.join(suffixes)}, got {word!r}")
        return Path(word)

    return option(Path, "FILE", read)


def _integer(word: str, low: int | None, high: int | None) -> int:
    # int() would take "1_0" and " 1", too
    value = int(word) if re.fullmatch(r"[+-]?\d+", word, re.ASCII) else None
    if value is None or value < (value if low is None else low) or value > (value if high is None else high):
        bounds = "".join(f" {word} {bound}" for word, bound in (("from", low), ("to", high)) if bound is not None)
        raise ValueError(f"expected an integer{bounds}, got {word!r}")
    return value


def _text(word: str) -> str:
    if not word:  # such as a shell variable that is not set
        raise ValueError("expected a non-empty string, got ''")
    return word


def _path(word: str) -> Path:
    if not word:
        raise ValueError("expected a path, got ''")
    return Path(word)


def _device(word: str) -> str:
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:\d+)?", word):
        raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {word!r}")
    return word


def one_of(known: Sequence[str]) -> Callable[[str], str]:
    """Reader of an option that is one of many names; a wrong one is answered with the most similar."""

    def read(word: str) -> str:
        if word in known:
            return word
        similar = difflib.get_close_matches(word, known, n=1)
        hint = f", did you mean {similar[0]}?" if similar else ""
        raise ValueError(f"expected one of {', '.join(known)}, got {word!r}{hint}")

    return read


PATH = option(Path, "PATH", _path)
"""Type of a path that is not empty."""

SomePath: TypeAlias = Annotated[Path, PATH]


def text(metavar: str) -> PrimitiveConstructorSpec[str]:
    """Type of an option that is a string, but not an empty one."""
    return option(str, metavar, _text)


DEVICE = option(str, "NAME", _device)
"""Type of a device's name."""

CHECKPOINT = arg(
    help="Weights: a run folder of hatnet-train, a checkpoint in it, a .safetensors file, or with --variant any other "
    "file of weights."
)
Checkpoint: TypeAlias = Annotated[Path, PATH, CHECKPOINT]
OptionalCheckpoint: TypeAlias = Annotated[Path | None, PATH, CHECKPOINT, arg(help_behavior_hint="")]
Variant: TypeAlias = Annotated[
    str | None,
    option(str, "NAME", one_of(list_models(ablations=True))),
    arg(
        help=f"Model: {', '.join(list_models())}, or an ablation of the paper, if --checkpoint does not record it.",
        help_behavior_hint="",
    ),
]
Device: TypeAlias = Annotated[
    str,
    DEVICE,
    arg(help="Where to compute: auto (a GPU if there is one), cpu, cuda or cuda:N."),
]
Images: TypeAlias = Annotated[
    Positional[tuple[Path, ...]],
    several(option(Path, "IMAGE", _path)),
    arg(help="Image files, or folders, which are searched recursively.", help_behavior_hint="(required)"),
]
Batch: TypeAlias = Annotated[int, whole(1), arg(help="Images that a process computes at a time.")]
Format: TypeAlias = Annotated[Literal["table", "json"], arg(help="How the result is printed.")]
"""Options that mean the same in every command."""


def run(
    prog: str,
    commands: type[Command] | Mapping[str, type[Command]],
    arguments: Sequence[str] | None = None,
    *,
    version: str,
    main: str | None = None,
    description: str | None = None,
    default: Callable[[type[Command], list[str]], Any] | None = None,
    explain: Callable[[Exception, Command], str] | None = None,
    registry: tyro.constructors.ConstructorRegistry | None = None,
) -> int:
    """Parse the arguments and run the command.

    Args:
        prog: name of the program.
        commands: its command, or its subcommands by name.
        arguments: those of the process by default.
        version: printed by ``--version``.
        main: subcommand that runs unless the first word names another.
        description: for the help of a program with subcommands.
        default: takes the command and its arguments and returns an instance with other defaults, or None.
        registry: how types without a constructor of their own are read.
        explain: makes an error and the options one line; :func:`error_text` by default.

    Returns:
        The exit status.

    Raises:
        SystemExit: after ``--help`` and usage errors.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is not None and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        if "--version" in words:
            say(f"{prog} {version}")
            return 0
        name, command, words = _chosen(prog, commands, words, main, description)
        settings: dict[str, Any] = {"config": (tyro.conf.OmitArgPrefixes,), "registry": registry}
        if default is not None and (values := default(command, words)) is not None:
            settings["default"] = values
        with _on_rank_0():
            options: Command = tyro.cli(
                command, prog=name, args=words, description=inspect.getdoc(command), **settings
            )
        object.__setattr__(options, "arguments", tuple(words))
        with log_to_stderr(name, logging.WARNING if options.quiet else logging.INFO - 10 * options.verbose) as log:
            return _work(options, name, log, explain or error_text)
    except OutputClosedError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return CLOSED
    except OSError as error:  # of standard output
        sys.stderr.write(f"{prog}: error: {error.filename}: {error.strerror}\n")
        return FAILED


def _work(options: Command, name: str, log: logging.Logger, explain: Callable[[Exception, Command], str]) -> int:
    try:
        return options.run() or 0
    except OutputClosedError:
        raise
    except KeyboardInterrupt:
        log.info("interrupted")
        return INTERRUPTED
    except UsageError as error:
        log.error("%s (see %s --help)", in_flags(str(error), options), name)
        return USAGE
    except Exception as error:  # libraries raise whatever they like
        if os.environ.get(TRACEBACK) or options.verbose:
            traceback.print_exc()
        log.error(explain(error, options), extra={"all_ranks": True})
        return FAILED


def _chosen(
    prog: str,
    commands: type[Command] | Mapping[str, type[Command]],
    words: list[str],
    main: str | None,
    description: str | None,
) -> tuple[str, type[Command], list[str]]:
    """Return the command that the first word names, with its name and arguments."""
    if not isinstance(commands, Mapping):
        return prog, commands, words
    first = words[0] if words else ""
    if first in commands:
        return f"{prog} {first}", commands[first], words[1:]
    misspelt = first[:1] not in ("", "-") and (main is None or difflib.get_close_matches(first, commands))
    if misspelt:
        try:
            one_of(list(commands))(first)
        except ValueError as error:
            exit_with_usage(prog, str(error))
    if main is not None and not first.startswith("--tyro-"):  # completion covers all commands
        return prog, commands[main], words
    with _on_rank_0():
        tyro.extras.subcommand_cli_from_dict(dict(commands), prog=prog, description=description, args=words)
    raise AssertionError("tyro exits without a command")


def command_first(prog: str, words: list[str], modes: Mapping[str, str]) -> list[str]:
    """Replace an option that was once the name of a command, such as ``--verify``, by the command as first word."""
    found = [word for word in words if word.partition("=")[0] in modes]
    if len(found) > 1:
        exit_with_usage(prog, f"{found[0]} cannot be combined with {found[1]}")
    if not found:
        return words
    name, _, value = found[0].partition("=")
    return [modes[name], *filter(None, [value]), *(word for word in words if word != found[0])]


def exit_with_usage(prog: str, problem: str) -> NoReturn:
    """Report a wrong command line and exit."""
    with log_to_stderr(prog) as log:
        log.error("%s (see %s --help)", problem, prog)
    sys.exit(USAGE)


@contextmanager
def log_to_stderr(name: str, level: int = logging.INFO) -> Iterator[logging.Logger]:
    """Write the records of all packages to standard error, as ``<name>: <message>``, those of rank 0 alone.

    A record with ``extra={"all_ranks": True}`` is written by every rank.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Line(name))
    handler.addFilter(lambda record: rank() == 0 or getattr(record, "all_ranks", False))
    loggers = [logging.getLogger(package) for package in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False  # to handlers of other libraries, which would write it once more
    try:
        yield loggers[0]
    finally:
        for logger, (old_level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = propagate


def rank() -> int:
    """Return the rank of this process in its launch, 0 without one."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


class _Line(logging.Formatter):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def format(self, record: logging.LogRecord) -> str:
        kind = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{self.name}: {kind}{record.getMessage()}"


def error_text(error: Exception, options: Command) -> str:
    """Return an error in one line; one that is not :data:`EXPECTED` with its type and how to see more."""
    text = in_flags(" ".join(str(error).split()), options)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, EXPECTED) and text:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ") + " (--verbose shows the traceback)"


def flags_of(options: Any) -> dict[str, str]:
    """Return the flag of every field, also of those in groups: ``--batch-size`` for ``batch_size``."""
    flags: dict[str, str] = {}
    for declared in dataclasses.fields(options):
        value = getattr(options, declared.name)
        flags |= flags_of(value) if dataclasses.is_dataclass(value) else {declared.name: f"--{declared.name}"}
    return {name: flag.replace("_", "-") for name, flag in flags.items()}


def in_flags(text: str, options: Command) -> str:
    """Spell the argument that a message begins with, or gives as ``name=value``, as the flag of a command."""
    for name, flag in flags_of(options).items():
        text = re.sub(rf"(?<![^\s(]){name}=('?)([\w.-]+)\1", rf"{flag} \2", text)
        text = re.sub(rf"^{name}(?= (must|is) )", flag, text)
    return text


def say(text: str) -> None:
    """Print a line to standard output and flush it.

    Raises:
        OutputClosedError: if standard output is closed.
        OSError: if it cannot be written, such as on a full disk.
    """
    try:
        print(text, flush=True)  # noqa: T201  # what every command prints with
    except BrokenPipeError as error:
        raise OutputClosedError from error
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


@contextmanager
def _on_rank_0() -> Iterator[None]:
    """Have tyro print with the errors of :func:`say`, and a wrong command line reported by rank 0 alone."""
    output = io.StringIO()
    silence = contextlib.nullcontext() if rank() == 0 else contextlib.redirect_stderr(io.StringIO())
    try:
        with contextlib.redirect_stdout(output), silence:
            yield
    finally:
        if output.getvalue():
            say(output.getvalue().rstrip())


def writable_file(path: Path, option: str = "--out") -> Path:
    """Return ``path``, given as ``option``, if a file can be written there.

    Raises:
        ValueError: naming the option and the path.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} must be a file in a folder that exists and can be written, got {str(path)!r}")
    return path


def writable_folder(path: Path, option: str = "--out") -> Path:
    """Return ``path`` if it is a folder that can be written, or can be created.

    Raises:
        ValueError: naming the option and the path.
    """
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{option} must be a folder that can be created and written, got {str(path)!r}")
    return path
