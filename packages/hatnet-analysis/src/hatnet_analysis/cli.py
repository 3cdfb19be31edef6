"""The ``hatnet-analysis`` command: what the paper says of its models and attention, measured.

Rows go to stdout, as a table for reading or as JSON for programs, pictures to files, progress to stderr. Whatever
goes wrong is one line on stderr and exit status 2. This module imports nothing that takes seconds; what measures is in
modules of its own, and imported when its command runs.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.choices import MAX_SIZE, MIN_SIZE, MODELS, SECTIONS, SIZES, TABLES
from hatnet_analysis.tables import Row, render

TRACEBACK = "HATNET_TRACEBACK"
"""Environment variable; if it is set, an error shows where it comes from."""

NAMES = f"""\
models: {", ".join(MODELS)}, or one of their ablations;
timm/NAME; a config of hatnet-dense, MMDetection or MMSegmentation, such as
retinanet_hatnet-s_fpn_1x_coco or mmdet::retinanet/retinanet_r50_fpn_1x_coco.py.
All have random weights."""

PEAK = "\nPeak memory is what a step holds beyond weights, images and optimizer state."

CONVENTIONS = """\
One multiply-add is one FLOP. Two conventions stand side by side:

  paper     convolutions, linear layers and normalisations, as in Table 2 of the paper
  complete  these and the products of activations, the two of every attention"""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and ``message``, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the arguments behind the program's name; those of the process by default.

    Raises:
        SystemExit: with status 0 after ``--help`` and ``--version``, 1 if nobody reads the output, 2 after an error,
            130 if interrupted.
    """
    parser = _parser()
    try:
        try:
            with warnings.catch_warnings():
                # torch's compiler, fvcore and the dense libraries warn of what a user of this command cannot change
                warnings.simplefilter("ignore")
                args = _parsed(parser, argv)
                parser = args.parser
                output = args.run(args)
            print(_encodable(output, sys.stdout.encoding or "utf-8", getattr(args, "format", "table")))
        finally:
            _flush()  # what --help wrote, too
    except BrokenPipeError:  # whoever reads has seen enough
        parser.exit(1)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except Exception as error:  # models and libraries raise whatever they like
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        parser.error(_said(error))


def _parsed(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        usage = " ".join(args.parser.format_usage().split()).removeprefix("usage: ")
        args.parser.error(f"unknown argument {unknown[0]!r}; expected {usage}")
    return args


def _said(error: Exception) -> str:
    """The message of an error in one line; one that does not speak to the user comes with its type and with a hint."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError | ImportError | OSError) and message:
        return message
    return f"{type(error).__name__}: {message} ({TRACEBACK}=1 in the environment shows where)"


def _encodable(text: str, encoding: str, style: str) -> str:
    """``text`` without what an output of this encoding cannot hold: escaped in JSON, question marks elsewhere."""
    return text.encode(encoding, "json" if style == "json" else "replace").decode(encoding)


def _escaped(error: Any) -> tuple[str, int]:
    """What codecs asks for in place of letters that an encoding does not have: as JSON writes them in ASCII."""
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error("json", _escaped)


def _flush() -> None:
    """Write what stdout still holds; if that fails, it goes nowhere, since Python would try once more at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def params(args: argparse.Namespace) -> str:
    """A row for each model or part: its number of parameters."""
    from hatnet_analysis.flops import block_names, count_params, stage_names
    from hatnet_analysis.models import on_meta, refusals

    rows: list[Row] = []
    for name in args.models:
        with refusals(name, (224, 224)):
            model = on_meta(name)
        if args.by == "model":
            rows.append({"model": name, "params": count_params(model)})
            continue
        for part in stage_names(model) if args.by == "stage" else block_names(model):
            rows.append({"model": name, "part": part, "params": count_params(model.get_submodule(part))})
    return render(rows, args.format)


def flops(args: argparse.Namespace) -> str:
    """A row for each model or part: its FLOPs in both conventions at the size asked for."""
    from hatnet_analysis.flops import count_flops
    from hatnet_analysis.models import load_model, refusals

    height, width = args.size
    rows: list[Row] = []
    for name in args.models:
        _progress(f"counting {name} at {height}×{width}")
        with refusals(name, args.size):
            counted = count_flops(load_model(name, args.size), height, width)
        parts = {"model": {"": counted.total}, "stage": counted.stages, "block": counted.blocks}
        parts["operator"] = counted.operators
        for part, count in parts[args.by].items():
            row: Row = {"model": name} | ({} if args.by == "model" else {"part": part})
            row |= {"height": height, "width": width}
            rows.append(row | {"flops_paper": count.paper, "flops_complete": count.complete})
    return render(rows, args.format)


def complexity(args: argparse.Namespace) -> str:
    """Eq. 5 and 15 beside the measured products, a row a stage; or the growth of four attentions."""
    if args.growth:
        return _growth(args)
    from hatnet_analysis.models import refusals
    from hatnet_analysis.paper import eq15_rows
    from hatnet_core import list_models

    _refuse_unused(args, ("sizes", "device", "out"), "with --growth")
    size, rows = args.size or (224, 224), []
    for name in args.models or MODELS:
        if name not in list_models(ablations=True):
            raise ValueError(f"Eq. 15 is about HAT-Net; expected one of {', '.join(MODELS)}, got {name!r}")
        _progress(f"counting {name} at {size[0]}×{size[1]}")
        with refusals(name, size):
            rows += eq15_rows(name, *size)
    return render(rows, args.format)


def _growth(args: argparse.Namespace) -> str:
    from hatnet_analysis.figures import growth_figure, save_figure
    from hatnet_analysis.growth import crossings, exponents, growth
    from hatnet_analysis.models import refusals
    from hatnet_analysis.throughput import checked_device

    if args.models:
        raise ValueError(f"--growth is about single layers and takes no model, got {args.models[0]}")
    _refuse_unused(args, ("size",), "without --growth, which has --sizes")
    out, device, sizes = _writable(args.out), str(checked_device(args.device or "cpu")), args.sizes or SIZES
    with refusals("the four attentions", (max(sizes), max(sizes))):
        rows = growth(sizes, device, progress=_progress)
    powers, found = exponents(rows), crossings(rows)
    if out is not None:
        save_figure(growth_figure(rows), out)
    if args.format == "json":
        return render([{"growth": rows, "exponents": powers, "crossings": found}], "json")
    named = [row for row in found if row["crossing"] is not None or row["between"]]
    parts = [render(rows, args.format), "power of the number of pixels between the two largest sizes measured:"]
    parts += [render(powers, args.format), "from where on one is dearer than the other:"]
    return "\n\n".join([*parts, render(named, args.format)])


def paper(args: argparse.Namespace) -> str:
    """The tables of the paper beside what is measured."""
    from hatnet_analysis.paper import table_rows
    from hatnet_analysis.throughput import checked_device

    if "memory" not in args.table:
        _refuse_unused(args, ("device",), "with the table memory")
    device = str(checked_device(args.device or "cpu"))
    tables = {table: table_rows(table, _progress, device) for table in args.table}
    if args.format == "json":
        return render([row for rows in tables.values() for row in rows], "json")
    titled = (f"{_title(table)}\n\n{render(rows, args.format)}" for table, rows in tables.items())
    return "\n\n".join(titled)


def _title(table: str) -> str:
    names = {"eq15": "Eq. 5 and Eq. 15, one block a stage, 224×224", "memory": "Sec. 4.4, memory of SiLU and GELU"}
    return names.get(table, f"Table {table}")


def throughput(args: argparse.Namespace) -> str:
    """Images a second of models in turns."""
    from hatnet_analysis.throughput import measure_throughput

    return render(measure_throughput(args.models, _settings(args), _progress), args.format)


def compare(args: argparse.Namespace) -> str:
    """Throughput, FLOPs, parameters and the papers' top-1 in one table and one picture."""
    from hatnet_analysis.figures import compare_figure, save_figure
    from hatnet_analysis.throughput import COMPARED
    from hatnet_analysis.throughput import compare as measure

    out = _writable(args.out)
    rows = measure(args.models or COMPARED, _settings(args), _progress)
    if out is not None:
        save_figure(compare_figure(rows), out)
    return render(rows, args.format)


def _settings(args: argparse.Namespace) -> Any:
    from hatnet_analysis.throughput import Settings

    names = ("device", "batch", "dtype", "compile", "train", "channels_last", "rounds")
    return Settings(size=tuple(args.size), **{name: getattr(args, name) for name in names})


def attention(args: argparse.Namespace) -> str:
    """What one point of an image attends to, drawn and as rows."""
    from hatnet_analysis import attention_maps as maps
    from hatnet_analysis.figures import attention_figure, save_figure
    from hatnet_analysis.models import refusals

    out, size = _writable(args.out), tuple(args.size)
    image = maps.read_image(args.image)
    model, (mean, std) = maps.read_model(args.checkpoint, args.variant)
    with refusals(str(args.checkpoint or args.variant), size):
        maps.check_size(model, size)
        recorded = maps.record_weights(model, maps.to_input(image, size, mean, std))
    view = maps.look(recorded, image, tuple(args.point), args.stage, args.block, args.head)
    if out is not None:
        save_figure(attention_figure(image, view), out)
    return render([view.record()] if args.format == "json" else view.strongest(), args.format)


def report(args: argparse.Namespace) -> str:
    """One HTML page."""
    from hatnet_analysis.report import write_report

    tables = args.table or TABLES
    if "tables" not in args.sections:
        _refuse_unused(args, ("table",), "with the section tables")
    if "attention" not in args.sections:
        _refuse_unused(args, ("image", "checkpoint", "variant"), "with the section attention")
    if not {"complexity", "compare"} & set(args.sections) and not ("tables" in args.sections and "memory" in tables):
        _refuse_unused(args, ("device",), "with the sections complexity and compare, and the table memory")
    path = write_report(
        args.out, args.sections, tables, args.image, args.checkpoint, args.variant, args.device or "cpu", _progress
    )
    return f"written: {path}"


def _refuse_unused(args: argparse.Namespace, names: Sequence[str], when: str) -> None:
    """ValueError for an option that was given where it has no effect; those named here have None as their default."""
    for name in names:
        given = getattr(args, name)
        if given is not None:
            shown = " ".join(map(str, given)) if isinstance(given, list) else given
            raise ValueError(f"--{name} has an effect only {when}, got {shown}")


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _writable(path: Path | None) -> Path | None:
    """A picture's path, checked before anything is measured."""
    if path is None:
        return None
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"--out must end in .png or .svg, got {path}")
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out must be a file in a folder that exists and can be written, got {path}")
    return path


def _parser() -> Parser:
    parser = Parser(
        prog="hatnet-analysis",
        description="Parameters, FLOPs, complexity, speed and attention of HAT-Net, beside the paper's figures.",
        epilog="'hatnet-analysis COMMAND --help' describes a command. Exit status: 0; 2 after an error, which is one "
        f"line; 130 if interrupted. {TRACEBACK}=1 in the environment shows where an error comes from.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_params, _add_flops, _add_complexity, _add_paper, _add_throughput, _add_compare):
        add(commands)
    _add_attention(commands)
    _add_report(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], str], summary: str, description: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(run=run, parser=command)
    if name != "report":
        command.add_argument(
            "--format", choices=("table", "json", "markdown"), default="table", help="output format (default: table)"
        )
    return command


def _add_params(commands: Any) -> None:
    text = f"Count the parameters of models; those for classification have 1000 classes.\n\n{NAMES}"
    command = _command(commands, "params", params, "number of parameters", text)
    _models(command)
    _by(command, ("model", "stage", "block"))


def _add_flops(commands: Any) -> None:
    text = f"Count the FLOPs of one image. {CONVENTIONS}\n\n{NAMES}"
    command = _command(commands, "flops", flops, "FLOPs of one image, as the paper counts them and completely", text)
    _models(command)
    _by(command, ("model", "stage", "block", "operator"))
    _size(command)


def _add_complexity(commands: Any) -> None:
    text = (
        "Eq. 5 and Eq. 15 beside the same products measured, for one block of each stage. With --growth, the\n"
        "multiply-adds, time and peak memory of MHSA, windows, spatial reduction and H-MHSA as images grow, on the\n"
        "map of stage 2."
    )
    command = _command(commands, "complexity", complexity, "Eq. 5 and Eq. 15, measured; growth with the image", text)
    _models(command, "*", f"{', '.join(MODELS)}, or one of their ablations (default: the four)")
    _size(command)
    command.set_defaults(size=None)
    command.add_argument("--growth", action="store_true", help="measure the growth with the size of the image")
    command.add_argument(
        "--sizes",
        metavar="SIDE",
        nargs="+",
        type=_side,
        help=f"sides of the images of --growth, multiples of 32 (default: {' '.join(map(str, SIZES))})",
    )
    command.add_argument("--device", help="of --growth, cpu or cuda (default: cpu)")
    command.add_argument("--out", metavar="FILE", type=Path, help="log-log plot of --growth, .png or .svg")


def _add_paper(commands: Any) -> None:
    text = (
        "Every row of the paper's Tables 1-4 and 6: measured #Param and FLOPs beside the printed ones, with a\n"
        "verdict; accuracies, which need datasets, are shown as the paper's. 'eq15' is Eq. 5 and Eq. 15, 'memory'\n"
        "the claim of Sec. 4.4. Tables 2, 3, 4 and 6 take minutes and need hatnet-dense, 2 timm as well."
    )
    command = _command(commands, "paper", paper, "the paper's tables, measured", text)
    _table(command)
    command.add_argument("--device", help="for 'memory': cpu or cuda (default: cpu)")


def _add_throughput(commands: Any) -> None:
    text = f"Images a second of models that take turns; ratios are against the first.{PEAK}\n\n{NAMES}"
    command = _command(commands, "throughput", throughput, "images a second, latency and peak memory", text)
    _models(command)
    _speed(command)


def _add_compare(commands: Any) -> None:
    text = (
        "Throughput, FLOPs, parameters and the top-1 that the papers state, of HAT-Net and its peers (which need\n"
        f"timm), or of the models named.{PEAK}\n\n{NAMES}"
    )
    command = _command(commands, "compare", compare, "speed and size beside the papers' top-1", text)
    _models(command, "*", "name of a model, see above (default: HAT-Net and its peers)")
    _speed(command)
    command.add_argument("--out", metavar="FILE", type=Path, help="scatter plot, .png or .svg")


def _add_attention(commands: Any) -> None:
    text = (
        "What the local step (Eq. 6-8) and the global step (Eq. 11-13) attend to from one point of an image, and\n"
        "rollout over all blocks. The image is scaled to --size. Needs --checkpoint or --variant."
    )
    command = _command(commands, "attention", attention, "what a point of an image attends to", text)
    command.add_argument("image", metavar="IMAGE", type=Path, help="image file")
    command.add_argument(
        "--point",
        metavar=("X", "Y"),
        nargs=2,
        type=float,
        required=True,
        help="in pixels from the top left corner of the image, turned as its EXIF says",
    )
    command.add_argument("--stage", type=int, choices=(2, 3, 4, 5), default=2, help="as the paper counts (default: 2)")
    command.add_argument("--block", type=int, help="of the stage, from 0 (default: the last)")
    command.add_argument("--head", type=int, help="from 0 (default: the mean of all)")
    _checkpoint(command)
    _size(command)
    command.add_argument("--out", metavar="FILE", type=Path, help="picture, .png or .svg")


def _add_report(commands: Any) -> None:
    text = (
        "One HTML page without any other file: tables, plots, and an attention explorer in which a click on the\n"
        "image shows what that point attends to. All sections take about half an hour on two cores."
    )
    command = _command(commands, "report", report, "one HTML page with all of it", text)
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder; index.html is written there")
    command.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        metavar="SECTION",
        help=f"what the page holds: {', '.join(SECTIONS)} (default: all)",
    )
    _table(command)
    command.set_defaults(table=None)
    command.add_argument("--image", metavar="FILE", type=Path, help="for the explorer (default: drawn shapes)")
    _checkpoint(command)
    command.add_argument("--device", help="of the measurements, cpu or cuda (default: cpu)")


def _models(command: argparse.ArgumentParser, number: str = "+", text: str = "name of a model, see above") -> None:
    command.add_argument("models", metavar="MODEL", nargs=number, type=_model, help=text)


def _by(command: argparse.ArgumentParser, choices: tuple[str, ...]) -> None:
    command.add_argument("--by", choices=choices, default="model", help="what a row is (default: model)")


def _table(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--table",
        nargs="+",
        choices=TABLES,
        default=TABLES,
        metavar="TABLE",
        help=f"{', '.join(TABLES)} (default: all)",
    )


def _size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--size",
        metavar=("H", "W"),
        nargs=2,
        type=_side,
        default=(224, 224),
        help=f"height and width of the image in pixels, {MIN_SIZE} to {MAX_SIZE} (default: 224 224)",
    )


def _checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checkpoint", metavar="PATH", type=Path, help="file, or folder of hatnet-train")
    command.add_argument(
        "--variant",
        choices=MODELS,
        metavar="MODEL",
        help=f"one of {', '.join(MODELS)}; for checkpoints that do not say it; alone, random weights",
    )


def _speed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    command.add_argument("--batch", type=_positive, default=8, help="images of one step (default: 8)")
    _size(command)
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="autocast (default: float32)"
    )
    command.add_argument("--compile", action="store_true", help="with torch.compile")
    command.add_argument("--train", action="store_true", help="forward, backward and AdamW")
    command.add_argument("--channels-last", action="store_true", help="in that memory format")
    command.add_argument("--rounds", type=_positive, default=5, help="turns of each model (default: 5)")


def _model(name: str) -> str:
    from hatnet_analysis.models import check_name

    try:
        return check_name(name)
    except (ValueError, ImportError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _side(text: str) -> int:
    if not text.isdecimal() or not MIN_SIZE <= int(text) <= MAX_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of pixels from {MIN_SIZE} to {MAX_SIZE}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)
