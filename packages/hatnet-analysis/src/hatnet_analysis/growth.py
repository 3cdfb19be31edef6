"""How time and space of an attention grow with the image: MHSA, windows, spatial reduction and H-MHSA, measured.

One attention layer on the map of stage 2, a quarter of the image's sides, with 64 channels and one head: the stage
where the difference is largest. Each runs in two ways. ``materialised`` is the plain products, which hold the
attention weights as a tensor and which the formulas of space speak of; ``fused`` is what a user gets, where the
weights exist only in parts. Maps are in ``channels_last``, as the model lays them out between its layers. A point that
would take too long or too much memory is left out, and says so.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hatnet_analysis.complexity import (
    attention_macs,
    h_mhsa_bytes,
    h_mhsa_macs_completed,
    h_mhsa_weights,
    mhsa_bytes,
    mhsa_macs,
    mhsa_weights,
    reduction_bytes,
    reduction_macs,
    reduction_weights,
    window_bytes,
    window_macs,
    window_weights,
)
from hatnet_analysis.memory import peak_memory
from hatnet_core.attention import Attention, HierarchicalAttention, WindowAttention, global_attention
from hatnet_core.layers import GroupNorm

SIZES = (224, 320, 448, 640, 896, 1280, 2048)
"""Sides of the images in pixels."""

DIM = 64
"""C of stage 2 in Small, Medium and Large, which is one head there."""

GRID_SIZE = POOL_SIZE = REDUCTION = WINDOW_SIZE = 8
"""G1 and G2 of stage 2 (Table 1) and PVT's reduction there; the window is of G1's size, for comparison."""

MAX_MACS = 1.5e12
"""Largest forward pass that is timed on a CPU, in multiply-adds; 20 seconds on two cores."""

MEMORY_SHARE = 0.6
"""Part of the free memory that a point may be expected to take."""

LARGEST = 8192
"""Side in pixels up to which the formulas are compared with each other."""

TIMES = ("seconds_fused", "seconds_materialised")

MEASURED = (*TIMES, "memory_materialised")
"""Measured quantities whose crossings are named."""

WAYS = {"materialised": SDPBackend.MATH, "fused": None}

FIGURES = (("seconds", ""), ("seconds", "_lowest"), ("seconds", "_highest"), ("memory", ""))
"""What is measured of a way; the name of the way is in between."""


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
        name: as in tables and figures.
        build: makes the layer.
        macs: its multiply-adds on a map of H×W (Eq. 5, Eq. 15 or their relative).
        weights: attention weights that it holds at once.
        memory: bytes that it holds at the peak, as plain products.
    """

    name: str
    build: Callable[[], nn.Module]
    macs: Callable[[int, int], int]
    weights: Callable[[int, int], int]
    memory: Callable[[int, int], int]


CONTENDERS = (
    Contender(
        "MHSA",
        lambda: Attention(DIM, DIM),
        lambda h, w: mhsa_macs(h, w, DIM),
        lambda h, w: mhsa_weights(h, w, 1),
        lambda h, w: mhsa_bytes(h, w, DIM, 1),
    ),
    Contender(
        "spatial reduction (PVT)",
        lambda: SpatialReductionAttention(DIM, REDUCTION),
        lambda h, w: reduction_macs(h, w, DIM, REDUCTION),
        lambda h, w: reduction_weights(h, w, 1, REDUCTION),
        lambda h, w: reduction_bytes(h, w, DIM, 1, REDUCTION),
    ),
    Contender(
        "H-MHSA",
        lambda: HierarchicalAttention(DIM, DIM, GRID_SIZE, POOL_SIZE),
        lambda h, w: h_mhsa_macs_completed(h, w, DIM, GRID_SIZE, POOL_SIZE),
        lambda h, w: h_mhsa_weights(h, w, 1, GRID_SIZE, POOL_SIZE),
        lambda h, w: h_mhsa_bytes(h, w, DIM, 1, GRID_SIZE, POOL_SIZE),
    ),
    Contender(
        "window (Swin)",
        lambda: WindowAttention(DIM, DIM, WINDOW_SIZE),
        lambda h, w: window_macs(h, w, DIM, WINDOW_SIZE),
        lambda h, w: window_weights(h, w, 1, WINDOW_SIZE),
        lambda h, w: window_bytes(h, w, DIM, 1, WINDOW_SIZE),
    ),
)


def growth(
    sizes: Sequence[int] = SIZES,
    device: str = "cpu",
    rounds: int = 3,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Measure every contender at every size.

    Args:
        sizes: sides of square images in pixels, multiples of 32.
        device: ``cpu`` or ``cuda``.
        rounds: timed passes of a point; the median counts, the extremes tell how far it is to be trusted.
        progress: takes one line before each point.

    Returns:
        For each contender and size ``attention``, ``size``, ``height`` and ``width`` of the map, ``macs``, ``weights``
        and ``memory_formula`` (bytes) by the formulas, ``measured_macs``, the same products counted, and, a way,
        ``seconds_…`` with ``_lowest`` and ``_highest`` of the passes and ``memory_…`` (bytes, beyond input and
        parameters), None where ``not_measured`` tells the reason.

    Raises:
        ValueError: if a size is no multiple of 32.
    """
    for size in sizes:
        if size < 32 or size % 32:
            raise ValueError(f"sizes must be multiples of 32, got {size}")
    rows = []
    for contender in CONTENDERS:
        for size in sorted(set(sizes)):
            progress(f"{contender.name} at {size}×{size}")
            rows.append(_point(contender, size, torch.device(device), rounds))
    return rows


def _point(contender: Contender, size: int, device: torch.device, rounds: int) -> dict[str, Any]:
    side = size // 4
    macs, memory = contender.macs(side, side), contender.memory(side, side)
    row: dict[str, Any] = {"attention": contender.name, "size": size, "height": side, "width": side}
    row |= {"macs": macs, "weights": contender.weights(side, side), "memory_formula": memory}
    row |= {f"{what}_{way}{end}": None for way in WAYS for what, end in FIGURES}
    row |= {"measured_macs": None, "not_measured": None}
    layer = contender.build().eval().to(device)
    x = torch.randn(1, DIM, side, side, device=device).contiguous(memory_format=torch.channels_last)
    for way, backend in WAYS.items():
        reason = _too_much(macs, memory if way == "materialised" else 0, device)
        if reason:
            row["not_measured"] = f"{way}: {reason}" if row["not_measured"] is None else f"both ways: {reason}"
            continue
        times, row[f"memory_{way}"] = _measure(layer, x, backend, rounds)
        row[f"seconds_{way}"] = statistics.median(times)
        row[f"seconds_{way}_lowest"], row[f"seconds_{way}_highest"] = min(times), max(times)
        row["measured_macs"] = row["measured_macs"] or attention_macs(layer, side, side)
    return row


def _measure(layer: nn.Module, x: Tensor, backend: SDPBackend | None, rounds: int) -> tuple[list[float], int]:
    """Seconds of forward passes, and the peak bytes of one."""

    def run() -> None:
        if backend is None:
            layer(x)
        else:
            with sdpa_kernel(backend):
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
    """Why a point is left out: what it computes, or the bytes it would hold."""
    if device.type == "cpu" and macs > MAX_MACS:
        return f"{macs:.1e} multiply-adds"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{memory / 1e9:.0f} GB" if memory > MEMORY_SHARE * free else None


def fastest_rate(rows: Sequence[dict[str, Any]]) -> float | None:
    """Multiply-adds a second of the point that reached most, of all contenders, sizes and ways.

    With this one scale the multiply-adds of every contender become the least time that they could take here.

    Args:
        rows: of :func:`growth`.

    Returns:
        None where nothing was timed.
    """
    rates = (row["macs"] / row[f"seconds_{way}"] for row in rows for way in WAYS if row[f"seconds_{way}"])
    return max(rates, default=None)


def crossings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """From which size on one contender is dearer than another.

    Args:
        rows: of :func:`growth`.

    Returns:
        For each pair of contenders and each ``quantity`` (``macs`` and ``memory_formula`` by the formulas, measured
        ``seconds_fused``, ``seconds_materialised`` and ``memory_materialised``) the ``dearer`` and the ``cheaper`` one
        at the largest size compared, and the side of the square image in pixels from which on this order holds,
        ``crossing``, a real number; None where it holds at every size compared. Times are only compared at sizes
        where the passes of one are all slower than those of the other; where other sizes lie between the last one
        of the reverse order and the first from which on this order holds, there is no ``crossing``, but these two
        sizes stand in ``between``, the first of them None where no size has the reverse order. Formulas are compared
        up to :data:`LARGEST`. A pair is left out where no size was measured of both, or where the order at the
        largest is open.
    """
    found = []
    for first, second in combinations(CONTENDERS, 2):
        for quantity in ("macs", "memory_formula", *MEASURED):
            compare = _measured_change if quantity in MEASURED else _formula_change
            first_is_dearer, crossing, between = compare(first, second, quantity, rows)
            if first_is_dearer is not None:
                dearer, cheaper = (first, second) if first_is_dearer else (second, first)
                pair = {"dearer": dearer.name, "cheaper": cheaper.name}
                found.append({**pair, "quantity": quantity, "crossing": crossing, "between": between})
    return found


def by_formula(contender: Contender, quantity: str, size: int) -> int:
    """``macs`` or ``memory_formula`` of a contender for a square image of side ``size``, a multiple of 32."""
    formula = contender.macs if quantity == "macs" else contender.memory
    return formula(size // 4, size // 4)


def points(rows: Sequence[dict[str, Any]], contender: Contender, quantity: str) -> dict[int, float]:
    """What was measured of a contender, by size."""
    return {row["size"]: row[quantity] for row in rows if row["attention"] == contender.name and row[quantity]}


Change = tuple[bool | None, float | None, list[int | None] | None]
"""Whether the first is the dearer one in the end, None if that is open; the size from which on, None if always; the
sizes that it lies between, if no more is clear."""


def _formula_change(first: Contender, second: Contender, quantity: str, _: Sequence[dict[str, Any]]) -> Change:
    """Multiply-adds a position are linear in the number of positions, so that between two sizes no root is missed."""
    sizes = range(32, LARGEST + 1, 32)
    differences = [by_formula(first, quantity, size) - by_formula(second, quantity, size) for size in sizes]
    squares = [float(size**2) for size in sizes]
    dearer, square = _last_change(squares, [d / square for d, square in zip(differences, squares, strict=True)])
    return dearer, None if square is None else math.sqrt(square), None


def _measured_change(first: Contender, second: Contender, quantity: str, rows: Sequence[dict[str, Any]]) -> Change:
    """Between two sizes the quotient is taken as a power of the size."""
    ours, theirs = (points(rows, contender, quantity) for contender in (first, second))
    sizes = sorted(ours.keys() & theirs.keys())
    orders = [_order(first, second, quantity, rows, size) for size in sizes]
    if not orders or not orders[-1]:
        return None, None, None
    reverse = max((i for i, order in enumerate(orders) if order == -orders[-1]), default=-1)
    since = 1 + max((i for i, order in enumerate(orders) if order != orders[-1]), default=-1)
    if since > reverse + 1:
        return orders[-1] > 0, None, [sizes[reverse] if reverse >= 0 else None, sizes[since]]
    sizes = sizes[max(reverse, 0) :]
    dearer, log = _last_change([math.log(size) for size in sizes], [math.log(ours[s] / theirs[s]) for s in sizes])
    return dearer, None if log is None else math.exp(log), None


def _order(first: Contender, second: Contender, quantity: str, rows: Sequence[dict[str, Any]], size: int) -> int:
    """1 where the first is dearer at a size, -1 where the second is, 0 where the spreads of their times overlap."""
    low, high = (f"{quantity}_lowest", f"{quantity}_highest") if quantity in TIMES else (quantity, quantity)
    (our_low, our_high), (their_low, their_high) = (
        (points(rows, contender, low)[size], points(rows, contender, high)[size]) for contender in (first, second)
    )
    return (our_low > their_high) - (our_high < their_low)


def _last_change(places: Sequence[float], values: Sequence[float]) -> tuple[bool | None, float | None]:
    """Whether the last value is above zero, and the place of its last root, on straight lines between the places."""
    if not values or values[-1] == 0:
        return None, None
    above = values[-1] > 0
    other = [i for i, value in enumerate(values) if value == 0 or (value > 0) != above]
    if not other:
        return above, None
    (a, b), (low, high) = places[other[-1] : other[-1] + 2], values[other[-1] : other[-1] + 2]
    return above, a + (b - a) * -low / (high - low)


def exponents(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """How a measured quantity grows: the power of the number of pixels between the two largest sizes measured.

    Args:
        rows: of :func:`growth`.

    Returns:
        For each contender ``attention``, and ``power_of_…`` of ``macs`` (by the formula), ``seconds_fused``,
        ``memory_fused`` and ``memory_materialised``; 1 is linear in the number of pixels, 2 quadratic, None
        where fewer than two sizes were measured.
    """
    table = []
    for contender in CONTENDERS:
        row: dict[str, Any] = {"attention": contender.name}
        for quantity in ("macs", "seconds_fused", "memory_fused", "memory_materialised"):
            found = list(points(rows, contender, quantity).items())
            row[f"power_of_{quantity}"] = None
            if len(found) > 1:
                (a, low), (b, high) = found[-2:]
                row[f"power_of_{quantity}"] = math.log(high / low) / math.log((b / a) ** 2)
        table.append(row)
    return table


def summary(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of :func:`growth`, their :func:`exponents` and the :func:`crossings` that exist, by title."""
    crossed = [row for row in crossings(rows) if row["crossing"] is not None or row["between"]]
    return {
        "Growth with the image": rows,
        "Power of the number of pixels, between the two largest sizes": exponents(rows),
        "From where on one costs more than the other": crossed,
    }
