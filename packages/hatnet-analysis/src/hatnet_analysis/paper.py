"""The paper's Tables 1-4 and 6 beside what is measured here: parameters and FLOPs; accuracies stand as the paper's.

HAT-Net is ours; a peer is built by timm, MMDetection or MMSegmentation where they have it, and is otherwise listed
without a measurement. Figures of the paper are kept as they are printed: "equal" means that the measured figure,
rounded to as many digits, is the printed one. A figure that is printed with its further digits cut off differs, and
its verdict says that. The verdicts compare with both conventions of ``flops.py``; where the two sides differ,
``reason`` says why as far as that is known. No counter is adjusted until it agrees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from hatnet_analysis.complexity import stage_complexity
from hatnet_analysis.flops import count_flops, count_params
from hatnet_analysis.memory import peak_memory
from hatnet_analysis.paper_tables import TABLE_1
from hatnet_analysis.peers import DEFAULT_6, PaperRow, table_2, table_3, table_4, table_6
from hatnet_analysis.tables import TABLES
from hatnet_core import HATNet, create_model, list_models
from hatnet_core.attention import HierarchicalAttention

NOT_MEASURED = "not measured here"

CONTRACT = ("params_m", "paper_params_m", "flops_g_paper_convention", "flops_g_complete", "paper_flops_g")
"""Keys of every row beside ``table`` and ``model``; None in ``eq15`` and ``memory``, which have other figures."""

CUT = "cut, not rounded"


def table_rows(
    table: str, progress: Callable[[str], None] = lambda text: None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Measure one table.

    Args:
        table: one of :data:`hatnet_analysis.tables.TABLES`.
        device: ``cpu`` or ``cuda``, for ``memory``; counting is the same on any.
        progress: takes one line before each model.

    Returns:
        Rows with ``table``, ``model`` and the keys of :data:`CONTRACT`, None where there is no such figure. The tables
        of the paper have the ``difference_…`` of each measured one to the paper's, too, and ``verdict_params``; Tables
        2, 3, 4 and 6 ``verdict_flops``, ``reason``, ``source``, ``paper_accuracy`` and ``accuracy`` (which says that
        it is not measured here); Table 1 the stages; ``eq15`` and ``memory`` what :func:`eq15_rows` and
        :func:`memory_rows` say.

    Raises:
        ValueError: if the table is another.
        ImportError: if timm or hatnet-dense, which the peers come from, is not installed.
    """
    if table not in TABLES:
        raise ValueError(f"unknown table {table!r}; expected one of {', '.join(TABLES)}")
    if table == "1":
        return [_table_1_row(name) for name in list_models()]
    if table == "eq15":
        return [row for name in list_models() for row in eq15_rows(name)]
    if table == "memory":
        return memory_rows(device, progress=progress)
    rows = {"2": table_2, "3": table_3, "4": table_4, "6": table_6}[table]()
    measured = []
    for row in rows:
        progress(f"table {table}: {row.model}")
        measured.append(_measure(table, row))
    return _relative(measured) if table == "6" else measured


NEEDS = {"2": ("timm", "hatnet_dense"), "3": ("hatnet_dense",), "4": ("hatnet_dense",), "6": ("hatnet_dense",)}
"""The optional libraries that rows of a table are built by."""


def check_libraries(tables: Iterable[str]) -> None:
    """Look whether the libraries are installed that tables need, before anything is measured.

    Raises:
        ImportError: naming the table, the library and what installs it.
    """
    for table in tables:
        for library in NEEDS.get(table, ()):
            if find_spec(library) is None:
                name = library.replace("_", "-")
                extra = name.removeprefix("hatnet-")
                raise ImportError(f"table {table} needs {name}: pip install 'hatnet-analysis[{extra}]'")


def eq15_rows(name: str, height: int = 224, width: int = 224) -> list[dict[str, Any]]:
    """Eq. 5 and Eq. 15 beside the measured products, one row a stage.

    Args:
        name: of :func:`hatnet_core.list_models`.
        height: H of the image in pixels.
        width: W, likewise.

    Returns:
        The rows of :func:`hatnet_analysis.complexity.stage_complexity` with the keys of :data:`CONTRACT` and a
        ``verdict``: ``equal`` where the measured products are those of Eq. 15; ``within the bound`` or ``beyond the
        bound`` where G1 or G2 does not divide the map.
    """
    rows = stage_complexity(create_model(name), height, width)
    return [
        {"table": "eq15", "model": name, **dict.fromkeys(CONTRACT), **row, "verdict": _exactness(row)} for row in rows
    ]


def memory_rows(
    device: str = "cpu", batch: int = 4, size: int = 224, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Sec. 4.4: peak memory of a training step with SiLU and with GELU, HAT-Net-Small, as a ratio.

    Parameters, gradients and the state of AdamW exist before the step; the peak is what comes on top.

    Args:
        device: ``cpu`` or ``cuda``.
        batch: images of a step; the paper's is 128.
        size: side of the images in pixels.
        progress: takes one line before each model.

    Returns:
        A row for each activation with ``peak_memory_gib`` and ``ratio_to_silu`` beside the paper's, the keys of
        :data:`CONTRACT` and a ``verdict``, ``equal`` where the two ratios have the same two digits after the point.
    """
    peaks = {}
    for activation in ("silu", "gelu"):
        progress(f"training step with {activation}")
        peaks[activation] = _training_peak(activation, torch.device(device), batch, size)
    ratio, paper = peaks["gelu"] / peaks["silu"], 23.8 / 20.2
    verdict = (
        "equal" if round(ratio, 2) == round(paper, 2) else f"differs: GELU to SiLU is {ratio:.2f}, not {paper:.2f}"
    )
    printed = {"silu": 20.2, "gelu": 23.8}
    return [
        {
            "table": "memory",
            "model": f"hatnet_small ({activation})",
            **dict.fromkeys(CONTRACT),
            "device": device,
            "batch": batch,
            "peak_memory_gib": peak / 2**30,
            "ratio_to_silu": peak / peaks["silu"],
            "paper_memory_gb_batch_128": printed[activation],
            "paper_ratio_to_silu": printed[activation] / printed["silu"],
            "verdict": verdict,
        }
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


def _table_1_row(name: str) -> dict[str, Any]:
    """Configuration read off the weights of the built model, not off its arguments."""
    model = create_model(name)
    params_m, stages = TABLE_1[name]
    measured, flops = count_params(model) / 1e6, count_flops(model, 224, 224).total
    built = [_stage_text(stage) for stage in model.stages]
    figures = {
        "params_m": measured,
        "paper_params_m": float(params_m),
        "flops_g_paper_convention": flops.paper / 1e9,
        "flops_g_complete": flops.complete / 1e9,
        "paper_flops_g": None,
    }
    return {
        "table": "1",
        "model": name,
        **figures,
        **_differences(figures),
        "stages": built,
        "paper_stages": stages,
        "head_dim": model.config["head_dim"],
        "sizes": _grid_text(model),
        "verdict_params": _verdict(measured, params_m),
        "verdict_stages": "equal" if built == stages else "differs",
    }


def _stage_text(stage: Any) -> str:
    mlp = stage.blocks[0].mlp
    hidden, dim = mlp.expand.weight.shape[:2]
    return f"C{dim} K{mlp.dwconv.weight.shape[-1]} E{hidden // dim} ×{len(stage.blocks)}"


def _grid_text(model: HATNet) -> str:
    attentions = [stage.blocks[0].attn for stage in model.stages]  # type: ignore[union-attr,index]  # ModuleList: of Module
    hierarchical = [a for a in attentions if isinstance(a, HierarchicalAttention)]
    return f"G1 {[a.grid_size for a in hierarchical]} G2 {[a.pool_size for a in hierarchical]}"


def _measure(table: str, row: PaperRow) -> dict[str, Any]:
    result: dict[str, Any] = {"table": table, "model": row.model, "height": row.size[0], "width": row.size[1]}
    result |= {"params_m": None, "paper_params_m": None if row.params_m is None else float(row.params_m)}
    result |= {"flops_g_paper_convention": None, "flops_g_complete": None, "paper_flops_g": float(row.flops_g)}
    verdict_params = verdict_flops = "not built"
    if row.build is not None:
        model = row.build(row.size)
        params, flops = count_params(model) / 1e6, count_flops(model, *row.size).total
        paper_g, complete_g = flops.paper / 1e9, flops.complete / 1e9
        result |= {"params_m": params, "flops_g_paper_convention": paper_g, "flops_g_complete": complete_g}
        verdict_params = _params_verdict(model, row.params_m)
        verdict_flops = _flops_verdict(paper_g, complete_g, row.flops_g)
    result |= _differences(result)
    result |= {"verdict_params": verdict_params, "verdict_flops": verdict_flops}
    result |= {"reason": _reason((verdict_params, verdict_flops), row.reason), "source": row.source}
    return result | {"paper_accuracy": row.accuracy, "accuracy": NOT_MEASURED}


def _differences(figures: dict[str, Any]) -> dict[str, float | None]:
    """Of each measured figure to the printed one, None where one of them is missing."""
    differences = {}
    for measured, printed in (
        ("params_m", "paper_params_m"),
        ("flops_g_paper_convention", "paper_flops_g"),
        ("flops_g_complete", "paper_flops_g"),
    ):
        known = figures[measured] is not None and figures[printed] is not None
        differences[f"difference_{measured}"] = figures[measured] - figures[printed] if known else None
    return differences


def _reason(verdicts: tuple[str, str], known: str) -> str:
    """Why a row differs; a figure that is cut needs no further reason."""
    differing = [verdict for verdict in verdicts if verdict.startswith("differs")]
    if not differing:
        return ""
    if all(CUT in verdict for verdict in differing):
        return "the printed figure is the measured one without its further digits"
    return known or "not known"


def _params_verdict(model: nn.Module, printed: str | None) -> str:
    if printed is None:
        return "no figure in the paper"
    verdict = _verdict(count_params(model) / 1e6, printed)
    trainable = sum(p.numel() for p in model.train().parameters() if p.requires_grad) / 1e6
    if verdict != "equal" and _verdict(trainable, printed) == "equal":
        return "equal (without the layers that are frozen)"
    return verdict


def _digits(printed: str) -> int:
    return len(printed.partition(".")[2])


def _verdict(measured: float, printed: str) -> str:
    digits = _digits(printed)
    if f"{measured:.{digits}f}" == printed:
        return "equal"
    cut = f" ({CUT})" if _is_cut(measured, printed) else ""
    return f"differs by {measured - float(printed):+.{digits + 1}f}{cut}"


def _flops_verdict(paper_g: float, complete_g: float, printed: str) -> str:
    conventions = {"paper": paper_g, "complete": complete_g}
    equal = [name for name, value in conventions.items() if f"{value:.{_digits(printed)}f}" == printed]
    if equal:
        return "equal" if len(equal) == 2 else f"equal ({equal[0]} convention)"
    percent = {name: f"{100 * (value / float(printed) - 1):+.1f} %" for name, value in conventions.items()}
    cut = [name for name, value in conventions.items() if _is_cut(value, printed)]
    if cut:
        return f"differs by {percent[cut[0]]} ({cut[0]} convention; {CUT})"
    return f"differs by {percent['paper']} (paper convention), {percent['complete']} (complete)"


def _is_cut(measured: float, printed: str) -> bool:
    """Whether the printed figure is the measured one without its further digits."""
    scale = 10 ** _digits(printed)
    return math.floor(measured * scale) == round(float(printed) * scale)


def _exactness(row: dict[str, Any]) -> str:
    measured = row["measured_macs"]
    if measured == row["h_mhsa_macs"]:
        return "equal"
    if row["divides"]:
        return f"differs by {measured - row['h_mhsa_macs']:+d}"
    return "within the bound" if measured <= row["h_mhsa_bound"] else "beyond the bound"


def _relative(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Table 6 with the distance of each row from the default setting's, which no constant part of a count touches."""
    default = next(row for row in rows if row["model"] == "G1 = {}, G2 = {}".format(*DEFAULT_6))
    for row in rows:
        row["difference_g_complete"] = row["flops_g_complete"] - default["flops_g_complete"]
        row["paper_difference_g"] = row["paper_flops_g"] - default["paper_flops_g"]
    return rows
