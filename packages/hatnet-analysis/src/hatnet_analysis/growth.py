"""Measure how time and memory of MHSA, windows, spatial reduction and H-MHSA grow with the image.

One attention layer on the map of stage 2, a quarter of the image's sides, with 64 channels and one head: the stage
where the difference is largest. ``materialised`` runs the plain products, which keep the attention weights as a tensor
and which the formulas of memory describe; ``fused`` is PyTorch's default, where the weights exist only in parts. Maps
are in ``channels_last``, as between the layers of the model. A point that would take too long or too much memory is
skipped, with the reason in its row.

Functions of rows take those of :func:`growth`, measured now or read from the JSON of a report.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hatnet_analysis.complexity import Cost, attention_macs, h_mhsa_cost, mhsa_cost, reduction_cost, window_cost
from hatnet_analysis.memory import peak_memory
from hatnet_analysis.tables import Row, column, hidden, megabytes
from hatnet_core.attention import Attention, HierarchicalAttention, WindowAttention, global_attention
from hatnet_core.layers import GroupNorm

SIZES = (224, 320, 448, 640, 896, 1280, 2048)
"""Sides of the images in pixels."""

DIM = 64
"""C of stage 2 in Small, Medium and Large, which is one head there."""

SIZE = 8
"""G1 and G2 of stage 2 (Table 1) and PVT's reduction there; the window is of G1's size, for comparison."""

MAX_MACS = 1.5e12
"""Largest forward pass that is timed on a CPU, in multiply-adds; 20 seconds on two cores."""

MEMORY_SHARE = 0.6
"""Part of the free memory that a point may be expected to take."""

LARGEST = 8192
"""Side in pixels up to which the formulas are compared with each other."""

FORMULAS = ("macs", "memory_formula")

TIMES = ("seconds_fused", "seconds_materialised")

MEASURED = (*TIMES, "memory_materialised")
"""Measured quantities whose crossings are named."""

WAYS = {"materialised": SDPBackend.MATH, "fused": None}

Rows = Sequence[Mapping[str, Any]]


class SpatialReductionAttention(nn.Module):
    """PVT's attention to a map reduced by a strided convolution (Wang et al., ICCV 2021, Sec. 3.3).

    Args:
        dim: C, number of channels, which are one head.
        reduction: R, kernel and stride of the convolution.
    """

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.norm = GroupNorm(dim)
        self.q = nn.Conv2d(dim, dim, 1)
        self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction)
        self.reduced_norm = GroupNorm(dim)
        self.kv = nn.Conv2d(dim, 2 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[1, C, H, W] → [1, C, H, W]."""
        x = self.norm(x)
        return self.proj(global_attention(self.q(x), self.kv(self.reduced_norm(self.reduce(x))), 1))


@dataclass(frozen=True)
class Contender:
    """One kind of attention.

    Attributes:
        name: in tables and figures.
        build: makes the layer.
        cost: its formulas for a map of H×W, with C of :data:`DIM` and one head.
    """

    name: str
    build: Callable[[], nn.Module]
    cost: Callable[..., Cost]

    def formula(self, quantity: str, size: int) -> int:
        """Evaluate ``macs``, ``weights`` or ``memory_formula`` for a square image of side ``size``."""
        cost = self.cost(size // 4, size // 4, DIM)
        return int(getattr(cost, quantity.removesuffix("_formula")))


CONTENDERS = (
    Contender("MHSA", lambda: Attention(DIM, DIM), mhsa_cost),
    Contender(
        "spatial reduction (PVT)",
        lambda: SpatialReductionAttention(DIM, SIZE),
        partial(reduction_cost, reduction=SIZE),
    ),
    Contender(
        "H-MHSA",
        lambda: HierarchicalAttention(DIM, DIM, SIZE, SIZE),
        partial(h_mhsa_cost, grid_size=SIZE, pool_size=SIZE),
    ),
    Contender("window (Swin)", lambda: WindowAttention(DIM, DIM, SIZE), partial(window_cost, window_size=SIZE)),
)


@dataclass(kw_only=True)
class GrowthRow(Row):
    """One attention at one size: formulas, seconds of forward passes (median, extremes), peak bytes.

    ``measured_macs`` are the multiply-adds counted. What is not measured is None, with the reason in ``not_measured``.
    """

    attention: str
    size: int
    height: int
    width: int
    macs: int = column("multiply-adds (G)", 1e9, 3)
    weights: int = hidden()
    memory_formula: int = megabytes("memory, formula")
    seconds_materialised: float | None = column("time, materialised (s)", digits=4, default=None)
    seconds_materialised_lowest: float | None = hidden(None)
    seconds_materialised_highest: float | None = hidden(None)
    memory_materialised: int | None = megabytes("memory, materialised", None)
    seconds_fused: float | None = column("time, fused (s)", digits=4, default=None)
    seconds_fused_lowest: float | None = hidden(None)
    seconds_fused_highest: float | None = hidden(None)
    memory_fused: int | None = megabytes("memory, fused", None)
    measured_macs: int | None = column("measured (M)", 1e6, 2, default=None)
    not_measured: str | None = None


@dataclass(kw_only=True)
class PowerRow(Row):
    """Powers of the number of pixels that an attention grows with; 1 is linear, 2 quadratic, None not measured."""

    attention: str
    power_of_macs: float | None = column("multiply-adds", digits=2)
    power_of_seconds_fused: float | None = column("time, fused", digits=2)
    power_of_memory_fused: float | None = column("memory, fused", digits=2)
    power_of_memory_materialised: float | None = column("memory, materialised", digits=2)


@dataclass(kw_only=True)
class CrossingRow(Row):
    """The side in pixels from which on one attention, ``slower``, takes more of a quantity than another.

    ``crossing`` is None where that order holds at every size compared, or where it is only known to begin
    ``between`` two sizes, the first of them None if no size has the reverse order.
    """

    slower: str
    faster: str
    quantity: str
    crossing: float | None = column("from this side on (pixels)", digits=0)
    between: list[int | None] | None = column("from a side between (pixels)")  # noqa: RUF009  # a declaration


def growth(
    sizes: Sequence[int] = SIZES,
    device: str = "cpu",
    rounds: int = 3,
    progress: Callable[[str], None] = lambda text: None,
) -> list[GrowthRow]:
    """Measure every contender at every size.

    Args:
        sizes: sides of square images in pixels, multiples of 32.
        device: ``cpu`` or ``cuda``.
        rounds: timed passes of a point.
        progress: called with one line before each point.

    Raises:
        ValueError: if a size is not a positive multiple of 32.
    """
    for size in sizes:
        if size < 32 or size % 32:
            raise ValueError(f"sizes must be multiples of 32, got {size}")
    rows = []
    for contender, size in product(CONTENDERS, sorted(set(sizes))):
        progress(f"{contender.name} at {size}×{size}")
        rows.append(_point(contender, size, torch.device(device), rounds))
    return rows


def _point(contender: Contender, size: int, device: torch.device, rounds: int) -> GrowthRow:
    side = size // 4
    formulas: dict[str, Any] = {
        quantity: contender.formula(quantity, size) for quantity in ("macs", "weights", "memory_formula")
    }
    row = GrowthRow(attention=contender.name, size=size, height=side, width=side, **formulas)
    layer = contender.build().eval().to(device)
    x = torch.randn(1, DIM, side, side, device=device).contiguous(memory_format=torch.channels_last)
    for way, backend in WAYS.items():
        if reason := _too_much(row.macs, row.memory_formula if way == "materialised" else 0, device):
            row.not_measured = f"{way}: {reason}" if row.not_measured is None else f"both ways: {reason}"
            continue
        times, memory = _measure(layer, x, backend, rounds)
        values = {"": statistics.median(times), "_lowest": min(times), "_highest": max(times)}
        for end, seconds in values.items():
            setattr(row, f"seconds_{way}{end}", seconds)
        setattr(row, f"memory_{way}", memory)
        row.measured_macs = row.measured_macs or attention_macs(layer, side, side)
    return row


def _measure(layer: nn.Module, x: Tensor, backend: SDPBackend | None, rounds: int) -> tuple[list[float], int]:
    """Return the seconds of forward passes, and the peak bytes of one."""

    def run() -> None:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            layer(x)
        if x.is_cuda:
            torch.cuda.synchronize()

    with torch.inference_mode():
        memory = peak_memory(run, x.device)  # the first pass, which also warms up
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return times, memory


def _too_much(macs: int, memory: int, device: torch.device) -> str | None:
    """Return why a point is skipped: its multiply-adds, or the bytes that it would take."""
    if device.type == "cpu" and macs > MAX_MACS:
        return f"{macs:.1e} multiply-adds"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{memory / 1e9:.0f} GB" if memory > MEMORY_SHARE * free else None


def points(rows: Rows, contender: Contender, quantity: str) -> dict[int, float]:
    """Return what was measured of a contender, by size."""
    return {row["size"]: row[quantity] for row in rows if row["attention"] == contender.name and row[quantity]}


def fastest_rate(rows: Rows) -> float | None:
    """Return the multiply-adds per second of the fastest point of all; None where nothing was timed.

    With this one scale the multiply-adds of every contender become the least time that they could take here.
    """
    rates = (row["macs"] / row[f"seconds_{way}"] for row in rows for way in WAYS if row[f"seconds_{way}"])
    return max(rates, default=None)


def exponents(rows: Rows) -> list[PowerRow]:
    """Return the growth of each contender between the two largest sizes measured."""
    return [
        PowerRow(
            attention=contender.name,
            **{
                f"power_of_{quantity}": _power(points(rows, contender, quantity))
                for quantity in ("macs", "seconds_fused", "memory_fused", "memory_materialised")
            },
        )
        for contender in CONTENDERS
    ]


def _power(series: Mapping[int, float]) -> float | None:
    if len(series) < 2:
        return None
    (a, low), (b, high) = list(series.items())[-2:]
    return math.log(high / low) / math.log((b / a) ** 2)


def crossings(rows: Rows) -> list[CrossingRow]:
    """Find the size from which on one contender is slower, or larger, than another.

    Formulas are compared up to :data:`LARGEST`, measured quantities at the sizes measured. Times are only compared at
    sizes where the passes of one are all slower than those of the other. A pair is omitted where no size was measured
    of both, or where the order at the largest is open.
    """
    found = []
    for pair, quantity in product(combinations(CONTENDERS, 2), (*FORMULAS, *MEASURED)):
        if quantity in FORMULAS:
            order, crossing = _formula_change(*pair, quantity)
            between = None
        else:
            order, crossing, between = _measured_change(*pair, quantity, rows)
        if order:
            slower, faster = pair if order > 0 else pair[::-1]
            names = {"slower": slower.name, "faster": faster.name}
            found.append(CrossingRow(**names, quantity=quantity, crossing=crossing, between=between))
    return found


def _formula_change(first: Contender, second: Contender, quantity: str) -> tuple[float, float | None]:
    """Return the sign of first − second at the largest size, and the smallest size that has it; None if all do.

    Multiply-adds per position are linear in the number of positions, so that no root between two sizes is missed.
    """
    sizes = range(32, LARGEST + 1, 32)
    squares = [size**2 for size in sizes]
    differences = [first.formula(quantity, size) - second.formula(quantity, size) for size in sizes]
    square = _last_root(squares, np.divide(differences, squares))
    return differences[-1], None if square is None else math.sqrt(square)


def _measured_change(
    first: Contender, second: Contender, quantity: str, rows: Rows
) -> tuple[int, float | None, list[int | None] | None]:
    """Return the same and, if no more is clear, the two sizes between which the order changes."""
    ours, theirs = (points(rows, contender, quantity) for contender in (first, second))
    sizes = sorted(ours.keys() & theirs.keys())
    orders = np.array([_order(first, second, quantity, rows, size) for size in sizes])
    if not orders.size or not orders[-1]:
        return 0, None, None
    order = int(orders[-1])
    reverse, since = _last(orders == -order), _last(orders != order) + 1
    if since > reverse + 1:
        return order, None, [sizes[reverse] if reverse >= 0 else None, sizes[since]]
    sizes = sizes[max(reverse, 0) :]  # between two sizes the quotient is a power of the size
    log = _last_root(np.log(sizes), np.log([ours[size] / theirs[size] for size in sizes]))
    return order, None if log is None else math.exp(log), None


def _order(first: Contender, second: Contender, quantity: str, rows: Rows, size: int) -> int:
    """Return the sign of first − second at a size, 0 where the spreads of their times overlap."""
    low, high = (f"{quantity}_lowest", f"{quantity}_highest") if quantity in TIMES else (quantity, quantity)
    (our_low, our_high), (their_low, their_high) = (
        (points(rows, contender, low)[size], points(rows, contender, high)[size]) for contender in (first, second)
    )
    return (our_low > their_high) - (our_high < their_low)


def _last_root(places: ArrayLike, values: ArrayLike) -> float | None:
    """Return where values interpolated over places last change their sign; None where they never do."""
    x, y = np.asarray(places, float), np.asarray(values, float)
    y = y * np.sign(y[-1])
    i = _last(y <= 0)
    return None if i < 0 else float(np.interp(0, y[i : i + 2], x[i : i + 2]))


def _last(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask)[-1]) if mask.any() else -1


def summary(rows: Rows) -> dict[str, Rows]:
    """Return the rows of :func:`growth`, their :func:`exponents` and the :func:`crossings` that exist, by title."""
    crossed = [row for row in crossings(rows) if row.crossing is not None or row.between]
    return {
        "Growth with the image": rows,
        "Power of the number of pixels, between the two largest sizes": exponents(rows),
        "Crossover points": crossed,
    }
