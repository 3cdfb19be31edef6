"""The ``hatnet-analysis`` command: what the paper says of its models and attention, measured.

Rows go to stdout, as a table for reading or as JSON for programs, pictures to files, progress to stderr. How the
command looks and ends is in :mod:`hatnet_core.commands`. This module imports nothing that takes seconds; what measures
is in modules of its own, and imported when its command runs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.choices import MAX_SIZE, SECTIONS, SIZES, TABLES
from hatnet_analysis.tables import Row, render
from hatnet_core.commands import (
    STATUSES,
    Parser,
    UsageError,
    add_batch,
    add_checkpoint,
    add_device,
    add_format,
    add_size,
    add_variant,
    path_ending,
    say,
    some_path,
    whole,
    writable_file,
    writable_folder,
)
from hatnet_core.variants import MIN_SIZE, list_models

MODELS = list_models()

NAMES = f"""\
Models: {", ".join(MODELS)}, or one of their ablations; timm/NAME; a config of hatnet-dense, MMDetection or
MMSegmentation, such as retinanet_hatnet-s_fpn_1x_coco or mmdet::retinanet/retinanet_r50_fpn_1x_coco.py. All have
random weights."""

PEAK = " Peak memory is what a step holds beyond weights, images and optimizer state."

CONVENTIONS = """\
One multiply-add is one FLOP. Two conventions stand side by side:

  paper     convolutions, linear layers and normalisations, as in Table 2
  complete  these and the products of activations, the two of every attention"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    with warnings.catch_warnings():
        # torch's compiler, fvcore and the dense libraries warn of what a user of this command cannot change
        warnings.simplefilter("ignore")
        return parser().run(_main, arguments)


def _main(args: argparse.Namespace) -> None:
    say(args.run(args))


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

    _refuse_unused(args, ("sizes", "device", "out"), "with --growth")
    size, rows = args.size or (224, 224), []
    for name in args.models or MODELS:
        if name not in list_models(ablations=True):
            raise UsageError(f"Eq. 15 is about HAT-Net; expected one of {', '.join(MODELS)}, got {name!r}")
        _progress(f"counting {name} at {size[0]}×{size[1]}")
        with refusals(name, size):
            rows += eq15_rows(name, *size)
    return render(rows, args.format)


def _growth(args: argparse.Namespace) -> str:
    from hatnet_analysis.figures import growth_figure, save_figure
    from hatnet_analysis.growth import crossings, exponents, growth
    from hatnet_analysis.models import refusals

    if args.models:
        raise UsageError(f"--growth is about single layers and takes no model, got {args.models[0]}")
    _refuse_unused(args, ("size",), "without --growth, which has --sizes")
    out, device, sizes = _picture(args.out), _device(args), args.sizes or SIZES
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
    from hatnet_analysis.paper import check_libraries, table_rows

    if "memory" not in args.table:
        _refuse_unused(args, ("device",), "with the table memory")
    device = _device(args)
    check_libraries(args.table)
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

    out = _picture(args.out)
    rows = measure(args.models or COMPARED, _settings(args), _progress)
    if out is not None:
        save_figure(compare_figure(rows), out)
    return render(rows, args.format)


def _settings(args: argparse.Namespace) -> Any:
    from hatnet_analysis.throughput import Settings

    names = ("batch", "size", "dtype", "compile", "train", "channels_last", "rounds")
    return Settings(device=_device(args), **{name: getattr(args, name) for name in names})


def _device(args: argparse.Namespace) -> str:
    """The device that was asked for, by the name that goes into the rows."""
    from hatnet_analysis.throughput import checked_device

    return str(checked_device(args.device or "auto"))


def attention(args: argparse.Namespace) -> str:
    """What one point of an image attends to, drawn and as rows."""
    from hatnet_analysis import attention_maps as maps
    from hatnet_analysis.attention_input import read_image, read_model, to_input
    from hatnet_analysis.figures import attention_figure, save_figure
    from hatnet_analysis.models import refusals
    from hatnet_core.checkpoint import trained_size

    out = _picture(args.out)
    image = read_image(args.image)
    model, (mean, std) = read_model(args.checkpoint, args.variant)
    size = args.size or trained_size(args.checkpoint, MAX_SIZE)
    with refusals(str(args.checkpoint or args.variant), size):
        maps.check_size(model, size)
        recorded = maps.record_weights(model, to_input(image, size, mean, std))
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
    out = writable_folder(args.out)
    path = write_report(
        out, args.sections, tables, args.image, args.checkpoint, args.variant, _device(args), _progress
    )
    return f"written: {path}"


def _refuse_unused(args: argparse.Namespace, names: Sequence[str], when: str) -> None:
    """UsageError for an option that was given where it has no effect; those named here have None as their default."""
    for name in names:
        given = getattr(args, name)
        if given is not None:
            shown = " ".join(map(str, given)) if isinstance(given, list | tuple) else given
            raise UsageError(f"--{name} has an effect only {when}, got {shown}")


def _progress(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _picture(path: Path | None) -> Path | None:
    """A picture's path, checked before anything is measured."""
    return None if path is None else writable_file(path)


def parser() -> Parser:
    """The options of ``hatnet-analysis``."""
    made = Parser(
        "hatnet-analysis",
        description="Parameters, FLOPs, complexity, speed and attention of HAT-Net, beside the paper's figures.",
        epilog="examples:\n"
        "  hatnet-analysis flops hatnet_small --by stage\n"
        "  hatnet-analysis paper --table 1 2 --format markdown\n"
        "  hatnet-analysis attention photograph.jpg --variant hatnet_small \\\n"
        "      --point 220 120 --out seen.png\n\n"
        f"'hatnet-analysis COMMAND --help' describes a command.\n\n{STATUSES}",
        version=__version__,
    )
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_params, _add_flops, _add_complexity, _add_paper, _add_throughput, _add_compare):
        add(commands)
    _add_attention(commands)
    _add_report(commands)
    return made


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], str], summary: str, description: str, example: str
) -> Parser:
    epilog = f"example:\n  hatnet-analysis {name} {example}"
    command: Parser = commands.add_parser(name, help=summary, description=description, epilog=epilog)
    command.set_defaults(run=run)
    if name != "report":
        add_format(command, "markdown")
    return command


def _add_params(commands: Any) -> None:
    text = f"Count the parameters of models; those for classification have 1000 classes.\n\n{NAMES}"
    command = _command(commands, "params", params, "number of parameters", text, "hatnet_tiny timm/resnet50")
    _models(command)
    _by(command, ("model", "stage", "block"))


def _add_flops(commands: Any) -> None:
    text = f"Count the FLOPs of one image. {CONVENTIONS}\n\n{NAMES}"
    summary = "FLOPs of one image, as the paper counts them and completely"
    command = _command(commands, "flops", flops, summary, text, "hatnet_small --size 480 640 --by stage")
    _models(command)
    _by(command, ("model", "stage", "block", "operator"))
    add_size(command, (224, 224), MAX_SIZE)


def _add_complexity(commands: Any) -> None:
    text = (
        "Eq. 5 and Eq. 15 beside the same products measured, for one block of each stage. With --growth, the "
        "multiply-adds, time and peak memory of MHSA, windows, spatial reduction and H-MHSA as images grow, on the "
        "map of stage 2."
    )
    summary = "Eq. 5 and Eq. 15, measured; growth with the image"
    command = _command(commands, "complexity", complexity, summary, text, "--growth --out growth.png")
    _models(command, "*", f"{', '.join(MODELS)}, or one of their ablations (default: the four)")
    add_size(command, None, MAX_SIZE, " (default 224)")
    command.add_argument("--growth", action="store_true", help="measure the growth with the size of the image")
    command.add_argument(
        "--sizes",
        metavar="SIDE",
        nargs="+",
        type=whole(MIN_SIZE, MAX_SIZE, " of pixels"),
        help=f"sides of the images of --growth in pixels, multiples of 32 (default {' '.join(map(str, SIZES))})",
    )
    add_device(command, " with --growth", default=None)
    _out(command, "the log-log plot of --growth")


def _add_paper(commands: Any) -> None:
    text = (
        "Every row of the paper's Tables 1-4 and 6: measured #Param and FLOPs beside the printed ones, with a "
        "verdict; accuracies, which need datasets, are shown as the paper's. 'eq15' is Eq. 5 and Eq. 15, 'memory' "
        "the claim of Sec. 4.4. Tables 2, 3, 4 and 6 take minutes and need hatnet-dense, 2 timm as well."
    )
    command = _command(commands, "paper", paper, "the paper's tables, measured", text, "--table 1 2 --format markdown")
    _table(command)
    add_device(command, " the table 'memory'", default=None)


def _add_throughput(commands: Any) -> None:
    text = f"Images a second of models that take turns; ratios are against the first.{PEAK}\n\n{NAMES}"
    summary, example = "images a second, latency and peak memory", "hatnet_tiny timm/resnet18 --batch 16"
    command = _command(commands, "throughput", throughput, summary, text, example)
    _models(command)
    _speed(command)


def _add_compare(commands: Any) -> None:
    text = (
        "Throughput, FLOPs, parameters and the top-1 that the papers state, of HAT-Net and its peers (which need "
        f"timm), or of the models named.{PEAK}\n\n{NAMES}"
    )
    summary, example = "speed and size beside the papers' top-1", "--device cuda --batch 64 --out compare.png"
    command = _command(commands, "compare", compare, summary, text, example)
    _models(command, "*", "name of a model, see above (default: HAT-Net and its peers)")
    _speed(command)
    _out(command, "a scatter plot")


def _add_attention(commands: Any) -> None:
    text = (
        "What the local step (Eq. 6-8) and the global step (Eq. 11-13) attend to from one point of an image, and "
        "rollout over all blocks. The image is scaled to --size. Needs --checkpoint or --variant."
    )
    example = "photograph.jpg --variant hatnet_small \\\n      --point 220 120 --out seen.png"
    command = _command(commands, "attention", attention, "what a point of an image attends to", text, example)
    command.add_argument("image", metavar="IMAGE", type=Path, help="image file")
    command.add_argument(
        "--point",
        metavar=("X", "Y"),
        nargs=2,
        type=_coordinate,
        required=True,
        help="in pixels from the top left corner of the image, turned as its EXIF says",
    )
    command.add_argument("--stage", type=int, choices=(2, 3, 4, 5), default=2, help="as the paper counts (default 2)")
    command.add_argument("--block", type=whole(0), metavar="N", help="of the stage, from 0 (default: the last)")
    command.add_argument("--head", type=whole(0), metavar="N", help="from 0 (default: the mean of all)")
    add_checkpoint(command)
    add_variant(command, ", where the checkpoint does not say it; alone, one with random weights")
    add_size(command, None, MAX_SIZE, " (default as trained, or 224)")
    _out(command, "the picture")


def _add_report(commands: Any) -> None:
    text = (
        "One HTML page without any other file: tables, plots, and an attention explorer in which a click on the "
        "image shows what that point attends to. All sections take about half an hour on two cores, and need timm "
        "and hatnet-dense."
    )
    command = _command(commands, "report", report, "one HTML page with all of it", text, "--out page")
    command.add_argument("--out", metavar="DIR", type=some_path, required=True, help="write index.html to this folder")
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
    add_checkpoint(command)
    add_variant(command, ", where the checkpoint does not say it; alone, one with random weights")
    add_device(command, " what is measured", default=None)


def _models(command: Parser, number: str = "+", text: str = "name of a model, see above") -> None:
    action = command.add_argument("models", metavar="MODEL", nargs=number, type=_model, help=text)
    action.completer = lambda **_: list_models(ablations=True)  # type: ignore[attr-defined]  # argcomplete's


def _by(command: Parser, choices: tuple[str, ...]) -> None:
    command.add_argument("--by", choices=choices, default="model", help="what a row is (default model)")


def _table(command: Parser) -> None:
    command.add_argument(
        "--table",
        nargs="+",
        choices=TABLES,
        default=TABLES,
        metavar="TABLE",
        help=f"{', '.join(TABLES)} (default: all)",
    )


def _speed(command: Parser) -> None:
    add_device(command)
    add_batch(command, 8)
    add_size(command, (224, 224), MAX_SIZE)
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="autocast (default float32)"
    )
    command.add_argument("--compile", action="store_true", help="with torch.compile")
    command.add_argument("--train", action="store_true", help="forward, backward and AdamW")
    command.add_argument("--channels-last", action="store_true", help="in that memory format")
    command.add_argument("--rounds", type=whole(1), default=5, metavar="N", help="turns of each model (default 5)")


def _out(command: Parser, what: str) -> None:
    endings = (".png", ".svg")
    text = f"write {what} to this file, {' or '.join(endings)}"
    command.add_argument("--out", type=path_ending(*endings), metavar="FILE", help=text)


def _model(name: str) -> str:
    if name in list_models(ablations=True):
        return name
    from hatnet_analysis.models import check_name

    try:
        return check_name(name)
    except (ValueError, ImportError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _coordinate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of pixels") from None
