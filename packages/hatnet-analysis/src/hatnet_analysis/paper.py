"""Compare the paper's Tables 1-4 and 6 with measured parameters and FLOPs; accuracies are the paper's.

``data/table_*.csv`` holds the figures as printed: parameters in millions, FLOPs in G, accuracies in percent; a star
marks the training of the model's own paper, R and X are ResNet and ResNeXt, and a cell that is not legible is empty.
``build`` and ``backbone`` name what is measured (:class:`Printed`). ``reason`` names texts of ``data/reasons.csv``:
what is known of a difference, or a pattern seen in it, which need not be its cause.

A figure is "equal" if the measured one, rounded to as many digits, is the printed one. Verdicts compare FLOPs in both
conventions of ``flops.py``. No counter is adjusted until it agrees.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from hatnet_analysis.complexity import StageRow, stage_complexity
from hatnet_analysis.flops import count_flops, count_params
from hatnet_analysis.memory import peak_memory
from hatnet_analysis.models import classifier, load_model, with_backbone
from hatnet_analysis.tables import TABLES, Row, column, hidden
from hatnet_core import HATNet, create_model, list_models
from hatnet_core.attention import HierarchicalAttention

CUT = "cut, not rounded"

FILES = {"2": ("2",), "3": ("3",), "4": ("4_retinanet", "4_mask_rcnn"), "6": ("6",)}
"""Data files of the tables with peers."""

NEEDS = {"2": ("timm", "hatnet_dense"), "3": ("hatnet_dense",), "4": ("hatnet_dense",), "6": ("hatnet_dense",)}
"""Optional libraries that build rows of a table."""

NOT_ACCURACIES = ("model", "params_m", "flops_g", "height", "width", "build", "backbone", "reason")

PAPER_MEMORY = {"silu": 20.2, "gelu": 23.8}
"""GB of a training step at batch 128 (Sec. 4.4)."""

Progress = Callable[[str], None]


@dataclass(kw_only=True)
class TableRow(Row):
    """A row of any table; figures that it does not have are None."""

    table: str = hidden()
    model: str
    params_m: float | None = column("#Param (M)", digits=2, default=None)
    paper_params_m: float | None = column("the paper's", default=None)
    flops_g_paper_convention: float | None = column("FLOPs, paper (G)", digits=2, default=None)
    flops_g_complete: float | None = column("FLOPs, complete (G)", digits=2, default=None)
    paper_flops_g: float | None = column("the paper's (G)", default=None)


@dataclass(kw_only=True)
class ComparedRow(TableRow):
    """Measured figures, minus the printed ones where both are known."""

    difference_params_m: float | None = column("#Param, difference (M)", digits=2, default=None)
    difference_flops_g_paper_convention: float | None = column("FLOPs, paper, difference (G)", digits=2, default=None)
    difference_flops_g_complete: float | None = column("FLOPs, complete, difference (G)", digits=2, default=None)

    def __post_init__(self) -> None:
        printed = {"params_m": self.paper_params_m}
        printed |= dict.fromkeys(("flops_g_paper_convention", "flops_g_complete"), self.paper_flops_g)
        for name, figure in printed.items():
            if figure is not None and self[name] is not None:
                setattr(self, f"difference_{name}", self[name] - figure)


@dataclass(kw_only=True)
class VariantRow(ComparedRow):
    """A row of Table 1; stages are read off the weights of the built model."""

    stages: list[str]
    paper_stages: list[str] = hidden()  # noqa: RUF009  # a declaration, not a value
    head_dim: int
    sizes: str
    verdict_params: str = column("#Param")
    verdict_stages: str


@dataclass(kw_only=True)
class PeerRow(ComparedRow):
    """A row of Tables 2, 3, 4 or 6; the last two fields are None but in Table 6."""

    height: int
    width: int
    verdict_params: str = column("#Param")
    verdict_flops: str = column("FLOPs")
    reason: str
    source: str = hidden()
    paper_accuracy: dict[str, float]
    accuracy: str = "not measured here"
    difference_g_complete: float | None = column("to the default, complete (G)", digits=1, optional=True)
    paper_difference_g: float | None = column("to the default, the paper's (G)", digits=0, optional=True)


@dataclass(kw_only=True)
class EquationRow(StageRow, TableRow):
    """Eq. 5 and Eq. 15 compared with the measured products in one stage."""

    verdict: str


@dataclass(kw_only=True)
class MemoryRow(TableRow):
    """Peak memory of a training step with one activation."""

    device: str = hidden()
    batch: int
    peak_memory_gib: float = column("peak memory (GiB)", digits=3)
    ratio_to_silu: float = column("to SiLU", digits=3)
    paper_memory_gb_batch_128: float = column("the paper's, batch 128 (GB)")
    paper_ratio_to_silu: float = column("the paper's, to SiLU", digits=3)
    verdict: str


@dataclass(frozen=True)
class Printed:
    """A row as the paper prints it, and what builds its model here.

    Attributes:
        model: as the paper names it.
        params_m: #Param in millions, a string of the printed digits; empty where the table has no such column.
        flops_g: #FLOPs in G, a string, too.
        accuracy: the columns that need a data set, by their heading.
        size: height and width in pixels for the FLOPs.
        build: name for :func:`hatnet_analysis.load_model`; with ``backbone``, the config that gets it.
        backbone: config whose backbone is taken; without ``build``, it becomes a classifier.
        reason: why the measured figures differ; empty if that is not known.
    """

    model: str
    params_m: str
    flops_g: str
    accuracy: dict[str, float]
    size: tuple[int, int]
    build: str
    backbone: str
    reason: str

    @property
    def source(self) -> str:
        """The model that is measured."""
        if self.build and self.backbone:
            return f"{self.build} with the backbone of {self.backbone}"
        if self.backbone:
            return f"the backbone of {self.backbone}, average pool and linear layer"
        return self.build or "neither timm nor MMDetection nor MMSegmentation has it"

    def built(self) -> nn.Module | None:
        """Build the model; None if no library here has it."""
        if self.backbone:
            return with_backbone(self.build, self.backbone) if self.build else classifier(self.backbone)
        return load_model(self.build, self.size) if self.build else None


def printed(table: str) -> list[Printed]:
    """Read Table 2, 3, 4 or 6 in the order of the paper."""
    reasons = {row["id"]: row["text"] for row in _read("reasons")}
    rows = []
    for row in (row for name in FILES[table] for row in _read(f"table_{name}")):
        accuracy = {name: float(value) for name, value in row.items() if value and name not in NOT_ACCURACIES}
        size = int(row["height"]), int(row["width"])
        reason = "; and ".join(reasons[name] for name in row["reason"].split())
        figures = (row["params_m"], row["flops_g"], accuracy, size)
        rows.append(Printed(row["model"], *figures, row["build"], row["backbone"], reason))
    return rows


def _read(name: str) -> list[dict[str, str]]:
    text = files("hatnet_analysis").joinpath("data", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def table_rows(
    table: str, progress: Progress = lambda text: None, device: str = "cpu"
) -> list[VariantRow] | list[PeerRow] | list[EquationRow] | list[MemoryRow]:
    """Measure one table.

    Args:
        table: one of :data:`hatnet_analysis.tables.TABLES`.
        progress: called with one line before each model.
        device: ``cpu`` or ``cuda``, for ``memory``; counts are the same on both.

    Raises:
        ValueError: if there is no such table.
        ImportError: if timm or hatnet-dense, which build the peers, is not installed.
    """
    if table not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    if table == "1":
        return [_variant_row(row) for row in _read("table_1")]
    if table == "eq15":
        return [row for name in list_models() for row in eq15_rows(name)]
    if table == "memory":
        return memory_rows(device, progress=progress)
    rows = []
    for row in printed(table):
        progress(f"table {table}: {row.model}")
        rows.append(_peer_row(table, row))
    if table == "6":  # differences between settings are free of what all of them share
        default = next(row for row in rows if row.source == "mask-rcnn_hatnet-s_fpn_1x_coco")
        for measured in rows:
            measured.difference_g_complete = measured["flops_g_complete"] - default["flops_g_complete"]
            measured.paper_difference_g = measured["paper_flops_g"] - default["paper_flops_g"]
    return rows


def check_libraries(tables: Iterable[str]) -> None:
    """Check that the libraries which tables need are installed, before anything is measured.

    Raises:
        ImportError: naming the table, the library and what installs it.
    """
    for table in tables:
        for library in NEEDS.get(table, ()):
            if find_spec(library) is None:
                name = library.replace("_", "-")
                extra = name.removeprefix("hatnet-")
                raise ImportError(f"table {table} needs {name}: pip install 'hatnet-analysis[{extra}]'")


def eq15_rows(name: str, height: int = 224, width: int = 224) -> list[EquationRow]:
    """Compare Eq. 5 and Eq. 15 with the measured products of a model of ours, one row per stage.

    The verdict is ``equal`` where the measured products are those of Eq. 15, and ``within the bound`` or ``beyond the
    bound`` where G1 or G2 does not divide the map.
    """
    rows = stage_complexity(create_model(name), height, width)
    return [EquationRow(table="eq15", model=name, **row, verdict=_exactness(row)) for row in rows]


def memory_rows(
    device: str = "cpu", batch: int = 4, size: int = 224, progress: Progress = lambda text: None
) -> list[MemoryRow]:
    """Compare the peak memory of a training step of HAT-Net-Small with SiLU and with GELU (Sec. 4.4).

    Parameters, gradients and the state of AdamW exist before the step and are not counted. The verdict is ``equal``
    where the two ratios have the same two digits after the point.

    Args:
        device: ``cpu`` or ``cuda``.
        batch: images per step; the paper's is 128.
        size: side of the images in pixels.
        progress: called with one line before each model.
    """
    peaks = {}
    for activation in PAPER_MEMORY:
        progress(f"training step with {activation}")
        peaks[activation] = _training_peak(activation, torch.device(device), batch, size)
    ratio, paper = (values["gelu"] / values["silu"] for values in (peaks, PAPER_MEMORY))
    differs = f"differs: GELU to SiLU is {ratio:.2f}, not {paper:.2f}"
    return [
        MemoryRow(
            table="memory",
            model=f"hatnet_small ({activation})",
            device=device,
            batch=batch,
            peak_memory_gib=peak / 2**30,
            ratio_to_silu=peak / peaks["silu"],
            paper_memory_gb_batch_128=PAPER_MEMORY[activation],
            paper_ratio_to_silu=PAPER_MEMORY[activation] / PAPER_MEMORY["silu"],
            verdict="equal" if round(ratio, 2) == round(paper, 2) else differs,
        )
        for activation, peak in peaks.items()
    ]


def _training_peak(activation: str, device: torch.device, batch: int, size: int) -> int:
    torch.manual_seed(0)
    model = create_model("hatnet_small", activation=activation).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    images, labels = torch.randn(batch, 3, size, size, device=device), torch.zeros(batch, dtype=torch.long).to(device)

    def step() -> None:
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step()
    return peak_memory(step, device)


def _variant_row(row: dict[str, str]) -> VariantRow:
    model, stages = create_model(row["model"]), [row[f"stage_{i}"] for i in range(2, 6)]
    figures, built = _counted(model, 224, 224), [_stage_text(stage) for stage in model.stages]
    return VariantRow(
        table="1",
        model=row["model"],
        **figures,
        paper_params_m=float(row["params_m"]),
        stages=built,
        paper_stages=stages,
        head_dim=model.config["head_dim"],
        sizes=_grid_text(model),
        verdict_params=_verdict(figures["params_m"], row["params_m"]),
        verdict_stages="equal" if built == stages else "differs",
    )


def _stage_text(stage: Any) -> str:
    mlp = stage.blocks[0].mlp
    hidden_dim, dim = mlp.expand.weight.shape[:2]
    return f"C{dim} K{mlp.dwconv.weight.shape[-1]} E{hidden_dim // dim} ×{len(stage.blocks)}"


def _grid_text(model: HATNet) -> str:
    attentions = [stage.blocks[0].attn for stage in model.stages]  # type: ignore[union-attr,index]  # ModuleList: of Module
    hierarchical = [a for a in attentions if isinstance(a, HierarchicalAttention)]
    return f"G1 {[a.grid_size for a in hierarchical]} G2 {[a.pool_size for a in hierarchical]}"


def _peer_row(table: str, row: Printed) -> PeerRow:
    figures: dict[str, Any] = {}
    verdict_params = verdict_flops = "not built"
    if (model := row.built()) is not None:
        figures = _counted(model, *row.size)
        verdict_params = _params_verdict(model, row.params_m)
        verdict_flops = _flops_verdict(figures["flops_g_paper_convention"], figures["flops_g_complete"], row.flops_g)
    return PeerRow(
        table=table,
        model=row.model,
        height=row.size[0],
        width=row.size[1],
        **figures,
        paper_params_m=float(row.params_m) if row.params_m else None,
        paper_flops_g=float(row.flops_g),
        verdict_params=verdict_params,
        verdict_flops=verdict_flops,
        reason=_reason((verdict_params, verdict_flops), row.reason),
        source=row.source,
        paper_accuracy=row.accuracy,
    )


def _counted(model: nn.Module, height: int, width: int) -> dict[str, Any]:
    params, flops = count_params(model) / 1e6, count_flops(model, height, width).total
    return {
        "params_m": params,
        "flops_g_paper_convention": flops.paper / 1e9,
        "flops_g_complete": flops.complete / 1e9,
    }


def _reason(verdicts: tuple[str, str], known: str) -> str:
    """Return why a row differs; a figure that is cut needs no further reason."""
    differing = [verdict for verdict in verdicts if verdict.startswith("differs")]
    if not differing:
        return ""
    if all(CUT in verdict for verdict in differing):
        return "the printed figure is the measured one without its further digits"
    return known or "not known"


def _params_verdict(model: nn.Module, figure: str) -> str:
    if not figure:
        return "no figure in the paper"
    verdict = _verdict(count_params(model) / 1e6, figure)
    trainable = sum(p.numel() for p in model.train().parameters() if p.requires_grad) / 1e6
    if verdict != "equal" and _is_equal(trainable, figure):
        return "equal (without the layers that are frozen)"
    return verdict


def _verdict(measured: float, figure: str) -> str:
    if _is_equal(measured, figure):
        return "equal"
    cut = f" ({CUT})" if _is_cut(measured, figure) else ""
    return f"differs by {measured - float(figure):+.{_digits(figure) + 1}f}{cut}"


def _flops_verdict(paper_g: float, complete_g: float, figure: str) -> str:
    conventions = {"paper": paper_g, "complete": complete_g}
    equal = [name for name, value in conventions.items() if _is_equal(value, figure)]
    if equal:
        return "equal" if len(equal) == 2 else f"equal ({equal[0]} convention)"
    percent = {name: f"{100 * (value / float(figure) - 1):+.1f} %" for name, value in conventions.items()}
    for name, value in conventions.items():
        if _is_cut(value, figure):
            return f"differs by {percent[name]} ({name} convention; {CUT})"
    return f"differs by {percent['paper']} (paper convention), {percent['complete']} (complete)"


def _digits(figure: str) -> int:
    return len(figure.partition(".")[2])


def _is_equal(measured: float, figure: str) -> bool:
    return f"{measured:.{_digits(figure)}f}" == figure


def _is_cut(measured: float, figure: str) -> bool:
    """Return whether the printed figure is the measured one without its further digits."""
    scale = 10 ** _digits(figure)
    return math.floor(measured * scale) == round(float(figure) * scale)


def _exactness(row: StageRow) -> str:
    if row.measured_macs == row.h_mhsa_macs:
        return "equal"
    if row.divides:
        return f"differs by {row.measured_macs - row.h_mhsa_macs:+d}"
    return "within the bound" if row.measured_macs <= row.h_mhsa_bound else "beyond the bound"
