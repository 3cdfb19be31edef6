"""How time and space of an attention grow with the image: MHSA, windows, spatial reduction and H-MHSA, measured.

One attention layer on the map of stage 2, a quarter of the image's sides, with 64 channels and one head: the stage
where the difference is largest. Each runs in two ways. ``materialised`` holds the attention weights as a tensor,
which is what the formulas of space speak of; ``fused`` is what a user gets, where the weights exist only in parts. A
point that would take too long or too much memory is left out, and says so.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hatnet_analysis.complexity import (
    attention_macs,
    h_mhsa_macs_completed,
    h_mhsa_weights,
    mhsa_macs,
    mhsa_weights,
    reduction_macs,
    reduction_weights,
    window_macs,
    window_weights,
)
from hatnet_analysis.memory import peak_memory
from hatnet_core.attention import Attention, HierarchicalAttention, WindowAttention, token_attention
from hatnet_core.layers import group_norm

DIM = 64
"""C of stage 2 in Small, Medium and Large, which is one head there."""

GRID_SIZE = POOL_SIZE = REDUCTION = WINDOW_SIZE = 8
"""G1 and G2 of stage 2 (Table 1) and PVT's reduction there; the window is of G1's size, for comparison."""

SIZES = (224, 320, 448, 640, 896, 1280, 2048)
"""Default sides of the square images in pixels."""

MAX_MACS = 1.5e12
"""Largest forward pass that is timed on a CPU, in multiply-adds; 20 seconds on two cores."""

MEMORY_SHARE = 0.6
"""Part of the free memory that a point may be expected to take."""

WAYS = {"materialised": SDPBackend.MATH, "fused": None}


class SpatialReductionAttention(nn.Module):
    """PVT's attention to a map reduced by a strided convolution (Wang et al., ICCV 2021, Sec. 3.3).

    Args:
        dim: C, number of channels, which are one head.
        reduction: R, kernel and stride of the convolution.
    """

    def __init__(self, dim: int, reduction: int) -> None:
        super().__init__()
        self.norm = group_norm(dim)
        self.q = nn.Conv2d(dim, dim, 1)
        self.reduce = nn.Conv2d(dim, dim, reduction, stride=reduction)
        self.reduced_norm = group_norm(dim)
        self.kv = nn.Conv2d(dim, 2 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[1, C, H, W] → [1, C, H, W]."""
        x = self.norm(x)
        return self.proj(token_attention(1, self.q(x), self.kv(self.reduced_norm(self.reduce(x)))))


@dataclass(frozen=True)
class Contender:
    """One kind of attention.

    Attributes:
        name: as in tables and figures.
        build: makes the layer.
        macs: its multiply-adds on a map of H×W (Eq. 5, Eq. 15 or their relative).
        weights: attention weights that it holds at once.
    """

    name: str
    build: Callable[[], nn.Module]
    macs: Callable[[int, int], int]
    weights: Callable[[int, int], int]


CONTENDERS = (
    Contender(
        "MHSA",
        lambda: Attention(DIM, DIM),
        lambda h, w: mhsa_macs(h, w, DIM),
        lambda h, w: mhsa_weights(h, w, 1),
    ),
    Contender(
        "spatial reduction (PVT)",
        lambda: SpatialReductionAttention(DIM, REDUCTION),
        lambda h, w: reduction_macs(h, w, DIM, REDUCTION),
        lambda h, w: reduction_weights(h, w, 1, REDUCTION),
    ),
    Contender(
        "H-MHSA",
        lambda: HierarchicalAttention(DIM, DIM, GRID_SIZE, POOL_SIZE),
        lambda h, w: h_mhsa_macs_completed(h, w, DIM, GRID_SIZE, POOL_SIZE),
        lambda h, w: h_mhsa_weights(h, w, 1, GRID_SIZE, POOL_SIZE),
    ),
    Contender(
        "window (Swin)",
        lambda: WindowAttention(DIM, DIM, WINDOW_SIZE),
        lambda h, w: window_macs(h, w, DIM, WINDOW_SIZE),
        lambda h, w: window_weights(h, w, 1, WINDOW_SIZE),
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
        rounds: timed passes of a point; the median counts.
        progress: takes one line before each point.

    Returns:
        For each contender and size ``attention``, ``size``, ``height`` and ``width`` of the map, ``macs`` and
        ``weights`` by the formulas, ``measured_macs``, the same products counted, and, a way, ``seconds_…`` and
        ``memory_…`` (bytes, beyond input and parameters),
        None where ``not_measured`` tells the reason.

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
    macs, weights = contender.macs(side, side), contender.weights(side, side)
    row: dict[str, Any] = {"attention": contender.name, "size": size, "height": side, "width": side}
    row |= {"macs": macs, "weights": weights}
    row |= {f"{what}_{way}": None for way in WAYS for what in ("seconds", "memory")}
    row |= {"measured_macs": None, "not_measured": None}
    layer = contender.build().eval().to(device)
    x = torch.randn(1, DIM, side, side, device=device)
    for way, backend in WAYS.items():
        reason = _too_much(macs, weights if way == "materialised" else 0, device)
        if reason:
            row["not_measured"] = f"{way}: {reason}" if row["not_measured"] is None else f"both ways: {reason}"
            continue
        seconds, memory = _measure(layer, x, backend, rounds)
        row[f"seconds_{way}"], row[f"memory_{way}"] = seconds, memory
        row["measured_macs"] = row["measured_macs"] or attention_macs(layer, side, side)
    return row


def _measure(layer: nn.Module, x: Tensor, backend: SDPBackend | None, rounds: int) -> tuple[float, int]:
    """Median seconds and peak bytes of a forward pass."""

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
    return statistics.median(times), memory


def _too_much(macs: int, weights: int, device: torch.device) -> str | None:
    """Why a point is left out; the materialised way holds the weights before and after the softmax."""
    if device.type == "cpu" and macs > MAX_MACS:
        return f"{macs:.1e} multiply-adds"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    need = 3 * 4 * weights
    return f"{need / 1e9:.0f} GB" if need > MEMORY_SHARE * free else None


def crossings(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where one contender becomes dearer than another as images grow.

    Args:
        rows: of :func:`growth`.

    Returns:
        For each pair of contenders ``first`` and ``second``, and each ``quantity`` (``macs`` by the formulas, measured
        ``seconds_fused`` and ``memory_materialised``), the side of the square image at ``crossing`` in pixels, from
        which on ``first`` is the dearer one; None where one of them is dearer at every size compared.
    """
    found = []
    for i, first in enumerate(CONTENDERS):
        for second in CONTENDERS[i + 1 :]:
            pair = {"first": first.name, "second": second.name}
            found.append({**pair, "quantity": "macs", "crossing": _formula_crossing(first, second)})
            for quantity in ("seconds_fused", "memory_materialised"):
                points = [
                    {row["size"]: row[quantity] for row in rows if row["attention"] == c.name and row[quantity]}
                    for c in (first, second)
                ]
                found.append({**pair, "quantity": quantity, "crossing": _measured_crossing(*points)})
    return found


def _formula_crossing(first: Contender, second: Contender, largest: int = 8192) -> float | None:
    """The smallest multiple of 32 from which on the first has more multiply-adds, if it had fewer at 32."""
    sizes = range(32, largest + 1, 32)
    dearer = [first.macs(size // 4, size // 4) > second.macs(size // 4, size // 4) for size in sizes]
    if dearer[0] or not dearer[-1]:
        return None
    return next(size for size, is_dearer in zip(sizes, dearer, strict=True) if is_dearer)


def _measured_crossing(first: dict[int, float], second: dict[int, float]) -> float | None:
    """Between two sizes the quotient is interpolated as a power of the size."""
    sizes = sorted(first.keys() & second.keys())
    for a, b in pairwise(sizes):
        below, above = (math.log(first[size] / second[size]) for size in (a, b))
        if below <= 0 < above:
            return float(math.exp(math.log(a) + (math.log(b) - math.log(a)) * -below / (above - below)))
    return None


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
            points = [(r["size"], r[quantity]) for r in rows if r["attention"] == contender.name and r[quantity]]
            row[f"power_of_{quantity}"] = None
            if len(points) > 1:
                (a, low), (b, high) = points[-2:]
                row[f"power_of_{quantity}"] = math.log(high / low) / math.log((b / a) ** 2)
        table.append(row)
    return table
