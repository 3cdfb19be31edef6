"""The ``hatnet-analysis`` command: measure the paper's models and its attention.

Results go to standard output, pictures to files, progress to the log. :mod:`hatnet_core.console` parses, logs and ends
the commands. Modules that measure, and with them torch, are imported when a command runs.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from tyro.conf import Positional, arg

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.tables import SECTIONS, TABLES, AttendedRow, FlopsRow, ParamsRow, render, render_titled
from hatnet_core import console
from hatnet_core.console import (
    DEVICE,
    PATH,
    Batch,
    Command,
    Device,
    Flag,
    OptionalCheckpoint,
    UsageError,
    Variant,
    command_first,
    file_ending,
    one_of,
    option,
    pixels,
    say,
    several,
    whole,
    writable_file,
    writable_folder,
)
from hatnet_core.variants import MIN_SIZE, list_models

MAX_SIZE = 2**16
"""Largest side of an image in pixels; far above, the number of values overflows int64."""

logger = logging.getLogger(__name__)


def _model(name: str) -> str:
    if name in list_models(ablations=True):
        return name
    from hatnet_analysis.models import check_name

    try:
        return check_name(name)
    except ImportError as error:  # of an optional library
        raise ValueError(error) from error


NAMES = (
    f"{', '.join(list_models())}, or an ablation; timm/NAME; a config of hatnet-dense, MMDetection or MMSegmentation, "
    "such as retinanet_hatnet-s_fpn_1x_coco or mmdet::retinanet/retinanet_r50_fpn_1x_coco.py. Their weights are "
    "random. Or a run of hatnet-train, with its own."
)
SIZE = f"Height and width of the image in pixels, {MIN_SIZE} to {MAX_SIZE}; one number is both."

Models: TypeAlias = Annotated[
    Positional[tuple[str, ...]], several(option(str, "MODEL", _model)), arg(help=NAMES, help_behavior_hint="")
]
Size: TypeAlias = Annotated[tuple[int, int], pixels(MAX_SIZE), arg(help=SIZE)]
Picture: TypeAlias = Annotated[Path | None, file_ending(".png", ".svg"), arg(help_behavior_hint="")]
OptionalDevice: TypeAlias = Annotated[
    str | None,
    DEVICE,
    arg(
        help="Where to measure time and memory: auto (a GPU if there is one), cpu, cuda or cuda:N.",
        help_behavior_hint="(default: auto)",
    ),
]
Pretrained: TypeAlias = Annotated[
    Flag, arg(help="Download the released weights of --variant. Without it and --checkpoint, weights are random.")
]
TABLE = several(option(str, "TABLE", one_of(list(TABLES))))
SECTION = several(option(str, "SECTION", one_of(list(SECTIONS))))


@dataclass(frozen=True, kw_only=True)
class Rows(Command):
    """A command that prints a table."""

    format: Literal["table", "json", "markdown"] = "table"
    """Format of the result."""

    def run(self) -> None:
        """Measure and print."""
        say(self._result())

    def _result(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Params(Rows):
    """Count the parameters of models; classifiers have 1000 classes.

    Examples:
      hatnet-analysis params hatnet_tiny timm/resnet50
    """

    models: Models
    by: Literal["model", "stage", "block"] = "model"
    """Part of the model that a row counts."""

    def _result(self) -> str:
        from hatnet_analysis.flops import block_names, count_params, stage_names
        from hatnet_analysis.models import on_meta, refusals

        parts_of = {"model": lambda model: [""], "stage": stage_names, "block": block_names}[self.by]
        rows = []
        for name in self.models:
            with refusals(name, (224, 224)):
                model = on_meta(name)
            for part in parts_of(model):
                params = count_params(model.get_submodule(part))
                rows.append(ParamsRow(model=name, part=part or None, params=params))
        return render(rows, self.format)


@dataclass(frozen=True, kw_only=True)
class Flops(Rows):
    """Count the FLOPs of one image in two conventions. One multiply-add is one FLOP.

    Paper: convolutions, linear layers and normalisations, as in Table 2. Complete: these and the products of
    activations, the two of every attention.

    Examples:
      hatnet-analysis flops hatnet_small --size 480 640 --by stage
    """

    models: Models
    by: Literal["model", "stage", "block", "operator"] = "model"
    """Part of the model that a row counts."""

    size: Size = (224, 224)

    def _result(self) -> str:
        from hatnet_analysis.flops import count_flops
        from hatnet_analysis.models import load_model, refusals

        height, width = self.size
        rows = []
        for name in self.models:
            _progress(f"counting {name} at {height}×{width}")
            with refusals(name, self.size):
                counted = count_flops(load_model(name, self.size), height, width)
            parts = {"": counted.total} if self.by == "model" else getattr(counted, f"{self.by}s")
            for part, count in parts.items():
                counts = {"flops_paper": count.paper, "flops_complete": count.complete}
                rows.append(FlopsRow(model=name, part=part or None, height=height, width=width, **counts))
        return render(rows, self.format)


@dataclass(frozen=True, kw_only=True)
class Complexity(Rows):
    """Compare Eq. 5 and Eq. 15 with the products measured in one block of each stage.

    Examples:
      hatnet-analysis complexity hatnet_small
    """

    models: Annotated[
        Positional[tuple[str, ...]], several(option(str, "MODEL", one_of(list_models(ablations=True))))
    ] = tuple(list_models())
    """Models or ablations of the paper."""

    size: Size = (224, 224)

    def _result(self) -> str:
        from hatnet_analysis.models import refusals
        from hatnet_analysis.paper import eq15_rows

        rows = []
        for name in self.models:
            _progress(f"counting {name} at {self.size[0]}×{self.size[1]}")
            with refusals(name, self.size):
                rows += eq15_rows(name, *self.size)
        return render(rows, self.format)


@dataclass(frozen=True, kw_only=True)
class Growth(Rows):
    """Measure how MHSA, windows, spatial reduction and H-MHSA grow with the image, on the map of stage 2.

    Measures multiply-adds, time and peak memory.

    Examples:
      hatnet-analysis growth --out growth.png
    """

    sizes: Annotated[
        tuple[int, ...] | None,
        several(whole(MIN_SIZE, MAX_SIZE, "SIDE")),
        arg(help_behavior_hint="(default: seven from 224 to 2048)"),
    ] = None
    """Sides of the images in pixels, multiples of 32."""

    device: Device = "auto"
    out: Picture = None
    """Write the log-log plot to this file, .png or .svg."""

    def _result(self) -> str:
        from hatnet_analysis.figures import growth_figure, save_figure
        from hatnet_analysis.growth import SIZES, crossings, exponents, growth, summary
        from hatnet_analysis.models import refusals

        _check(self.out)
        device, sizes = _device(self.device), self.sizes or SIZES
        with refusals("the four attentions", (max(sizes), max(sizes))):
            rows = growth(sizes, device, progress=_progress)
        if self.out is not None:
            save_figure(growth_figure(rows), self.out)
        if self.format == "json":
            return render([{"growth": rows, "exponents": exponents(rows), "crossings": crossings(rows)}], "json")
        return render_titled(summary(rows), self.format)


@dataclass(frozen=True, kw_only=True)
class Paper(Rows):
    """Compare the paper's Tables 1-4 and 6 with measured parameters and FLOPs.

    Accuracies, which need data sets, are the paper's. Tables 2, 3, 4 and 6 take minutes and need hatnet-dense, 2 timm
    as well.

    Examples:
      hatnet-analysis paper --table 1 2 --format markdown
    """

    table: Annotated[tuple[str, ...], TABLE] = tuple(TABLES)
    """Tables to measure; eq15 is Eq. 5 and Eq. 15, memory the claim of Sec. 4.4."""

    device: OptionalDevice = None

    def _result(self) -> str:
        if "memory" not in self.table:
            _refuse_unused(self, ("device",), "with the table memory")
        from hatnet_analysis.paper import check_libraries, table_rows

        device = _device(self.device)
        check_libraries(self.table)
        tables = {TABLES[table]: table_rows(table, _progress, device) for table in self.table}
        if self.format == "json":
            return render([row for rows in tables.values() for row in rows], "json")
        return render_titled(tables, self.format)


@dataclass(frozen=True, kw_only=True)
class Speed(Rows):
    """Options of measuring speed."""

    device: Device = "auto"
    batch: Batch = 8
    size: Size = (224, 224)

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of autocast."""

    compile: Flag = False
    """Use torch.compile."""

    train: Flag = False
    """Measure forward, backward and AdamW."""

    channels_last: Flag = False
    """Use this memory format."""

    rounds: Annotated[int, whole(1)] = 5
    """Turns of each model."""

    def _settings(self) -> Any:
        from hatnet_analysis.throughput import Settings

        given = {name: value for name, value in vars(self).items() if name in Settings.__dataclass_fields__}
        return Settings(**given | {"device": _device(self.device)})


@dataclass(frozen=True, kw_only=True)
class Throughput(Speed):
    """Measure images per second, latency and peak memory of models that take turns.

    Ratios are to the first model. Peak memory is that of a step, without weights, images and optimizer state.

    Examples:
      hatnet-analysis throughput hatnet_tiny timm/resnet18 --batch 16
    """

    models: Models

    def _result(self) -> str:
        from hatnet_analysis.throughput import measure_throughput

        return render(measure_throughput(self.models, self._settings(), _progress), self.format)


@dataclass(frozen=True, kw_only=True)
class Compare(Speed):
    """Compare throughput, FLOPs, parameters and the top-1 stated in the papers.

    HAT-Net is compared with its peers, which need timm, unless models are named. --checkpoint adds a model of your own
    and its recorded top-1. Peak memory is that of a step, without weights, images and optimizer state.

    Examples:
      hatnet-analysis compare --device cuda --batch 64 --out compare.png
    """

    models: Models = ()
    checkpoint: OptionalCheckpoint = None

    out: Picture = None
    """Write a scatter plot to this file, .png or .svg."""

    def _result(self) -> str:
        from hatnet_analysis.figures import compare_figure, save_figure
        from hatnet_analysis.models import is_checkpoint
        from hatnet_analysis.throughput import COMPARED, compare

        _check(self.out)
        if self.checkpoint is not None and not is_checkpoint(str(self.checkpoint)):
            raise ValueError(f"{self.checkpoint}: must be a run of hatnet-train, or weights that record their model")
        own = () if self.checkpoint is None else (str(self.checkpoint),)
        rows = compare((*(self.models or COMPARED), *own), self._settings(), _progress)
        if self.out is not None:
            save_figure(compare_figure(rows), self.out)
        return render(rows, self.format)


@dataclass(frozen=True, kw_only=True)
class Attention(Rows):
    """Show what a point of an image attends to: the local step (Eq. 6-8), the global one (Eq. 11-13), and rollout.

    The image is scaled to --size. One of --checkpoint and --variant is needed; --variant alone has random weights.

    Examples:
      hatnet-analysis attention photograph.jpg --variant hatnet_small --point 220 120 --out seen.png
    """

    image: Annotated[Positional[Path], PATH, arg(metavar="IMAGE")]
    """Image file."""

    point: Annotated[tuple[float, float], arg(metavar="X Y")]
    """Point of the image in pixels from its top left corner, after EXIF rotation."""

    stage: Literal[2, 3, 4, 5] = 2
    """Stage as the paper counts."""

    block: Annotated[int | None, whole(0), arg(help_behavior_hint="(default: the last)")] = None
    """Block of the stage, from 0."""

    head: Annotated[int | None, whole(0), arg(help_behavior_hint="(default: the mean of all)")] = None
    """Head, from 0."""

    checkpoint: OptionalCheckpoint = None
    variant: Variant = None
    pretrained: Pretrained = False
    size: Annotated[
        tuple[int, int] | None, pixels(MAX_SIZE), arg(help=SIZE, help_behavior_hint="(default: as trained, or 224)")
    ] = None

    out: Picture = None
    """Write the picture to this file, .png or .svg."""

    def _result(self) -> str:
        from hatnet_analysis import attention_maps as maps
        from hatnet_analysis.attention_input import describe_weights, read_image, read_model, to_input
        from hatnet_analysis.figures import attention_figure, save_figure
        from hatnet_analysis.models import refusals
        from hatnet_core.checkpoint import trained_size

        _check(self.out)
        _check_weights(self.checkpoint, self.variant, self.pretrained)
        image = read_image(self.image)
        model, (mean, std) = read_model(self.checkpoint, self.variant, pretrained=self.pretrained)
        weights = describe_weights(self.checkpoint, self.variant, pretrained=self.pretrained)
        size = self.size or trained_size(self.checkpoint, MAX_SIZE)
        with refusals(str(self.checkpoint or self.variant), size):
            maps.check_size(model, size)
            recorded = maps.record_weights(model, to_input(image, size, mean, std))
        _warn_of_random(weights)
        view = maps.look(recorded, image, self.point, self.stage, self.block, self.head)
        if self.out is not None:
            save_figure(attention_figure(image, view, weights), self.out)
        if self.format == "json":
            return render([view.record()], "json")
        return render([AttendedRow(**row) for row in view.strongest()], self.format)


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Write one HTML page with tables, plots and an attention explorer; it needs no other file.

    In the explorer, a click on the image shows what that point attends to. All sections take about half an hour on two
    cores, and need timm and hatnet-dense.

    Examples:
      hatnet-analysis report --out page
    """

    out: Annotated[Path, PATH, arg(metavar="DIR")]
    """Write index.html to this folder."""

    sections: Annotated[tuple[str, ...], SECTION] = tuple(SECTIONS)
    """Sections of the page."""

    table: Annotated[tuple[str, ...] | None, TABLE, arg(help_behavior_hint=f"(default: {' '.join(TABLES)})")] = None
    """Tables to measure."""

    image: Annotated[Path | None, PATH, arg(metavar="FILE", help_behavior_hint="(default: drawn shapes)")] = None
    """Image for the explorer."""

    checkpoint: OptionalCheckpoint = None
    variant: Variant = None
    pretrained: Pretrained = False
    device: OptionalDevice = None

    def run(self) -> None:
        """Measure and write."""
        sections, tables = self.sections, self.table or tuple(TABLES)
        if "tables" not in sections:
            _refuse_unused(self, ("table",), "with the section tables")
        if "attention" not in sections:
            _refuse_unused(self, ("image", "checkpoint", "variant", "pretrained"), "with the section attention")
        if not {"complexity", "compare"} & {*sections} and not ("tables" in sections and "memory" in tables):
            _refuse_unused(self, ("device",), "with the sections complexity and compare, and the table memory")
        _check_weights(self.checkpoint, self.variant, self.pretrained)
        out = writable_folder(self.out)
        from hatnet_analysis.attention_input import describe_weights
        from hatnet_analysis.report import EXPLORED, write_report

        explored, device = (self.image, self.checkpoint, self.variant), _device(self.device)
        if "attention" in sections:
            variant = self.variant or EXPLORED
            _warn_of_random(describe_weights(self.checkpoint, variant, pretrained=self.pretrained))
        path = write_report(out, sections, tables, *explored, device, _progress, pretrained=self.pretrained)
        say(f"written: {path}")


COMMANDS = (Params, Flops, Complexity, Growth, Paper, Throughput, Compare, Attention, Report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["complexity"]:
        words = command_first("hatnet-analysis", words[1:], {"--growth": "growth"})
        words = words if words[:1] == ["growth"] else ["complexity", *words]
    with warnings.catch_warnings():
        # torch's compiler, fvcore and the dense libraries warn of what a user of this command cannot change
        warnings.simplefilter("ignore")
        return console.run(
            "hatnet-analysis",
            {command.__name__.lower(): command for command in COMMANDS},
            words,
            version=__version__,
            description="Parameters, FLOPs, complexity, speed and attention of HAT-Net, compared with the paper.",
        )


def _progress(text: str) -> None:
    logger.info("%s ...", text)


def _refuse_unused(options: Command, names: Sequence[str], when: str) -> None:
    for name in names:
        given = getattr(options, name)
        if given is not None and given is not False:
            shown = " ".join(map(str, given)) if isinstance(given, tuple) else given
            raise UsageError(f"--{name} has an effect only {when}, got {shown}")


def _check_weights(checkpoint: Path | None, variant: str | None, pretrained: bool) -> None:
    if pretrained and (checkpoint is not None or variant is None):
        given = "neither" if checkpoint is None else f"--checkpoint {checkpoint}"
        raise UsageError(f"--pretrained must come with --variant and without --checkpoint, got {given}")


def _warn_of_random(weights: str) -> None:
    from hatnet_analysis.attention_input import RANDOM

    if weights.startswith(RANDOM):
        logger.warning("%s; use --checkpoint or --pretrained", weights)


def _device(name: str | None) -> str:
    from hatnet_analysis.throughput import checked_device

    return str(checked_device(name or "auto"))


def _check(picture: Path | None) -> None:
    if picture is not None:
        writable_file(picture)
