"""Measure the throughput, latency and memory of models that take turns.

Every round runs all models and begins with another one each time. Ratios are formed within a round, so that a slow
phase of the machine slows both sides. Only ratios carry over to another machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hatnet_analysis.flops import count_flops, count_params
from hatnet_analysis.memory import peak_memory
from hatnet_analysis.models import load_model, recorded_top1, refusals
from hatnet_analysis.paper import printed
from hatnet_analysis.tables import Row, column, hidden, megabytes
from hatnet_core.devices import pick_device

Progress = Callable[[str], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OTHER_TOP1 = {"timm/convnext_tiny": 82.1, "timm/convnext_small": 83.1, "timm/convnext_base": 83.8}
"""Top-1 at 224×224 of models that Table 2 lacks, from their own paper (Liu et al., CVPR 2022, Table 1)."""

COMPARED = (
    "hatnet_tiny",
    "hatnet_small",
    "hatnet_medium",
    "hatnet_large",
    "timm/resnet50",
    "timm/pvt_v2_b1",
    "timm/pvt_v2_b2",
    "timm/pvt_v2_b3",
    "timm/swin_tiny_patch4_window7_224",
    "timm/swin_small_patch4_window7_224",
    "timm/twins_svt_small",
    "timm/convnext_tiny",
    "timm/convnext_small",
)
"""Models that :func:`compare` compares by default, of about the FLOPs of ours."""


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement of speed.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        batch: images per step.
        size: height and width in pixels.
        dtype: ``float32``, or one of the others under autocast.
        compile: whether to use ``torch.compile``; compiling is part of the warm-up.
        train: whether a step is forward, backward and AdamW instead of forward alone.
        channels_last: memory format of images and weights.
        rounds: turns of each model.
        seconds: least duration of a turn.
    """

    device: str = "cpu"
    batch: int = 8
    size: tuple[int, int] = (224, 224)
    dtype: str = "float32"
    compile: bool = False
    train: bool = False
    channels_last: bool = False
    rounds: int = 5
    seconds: float = 1.0


@dataclass(kw_only=True)
class SpeedRow(Row):
    """Speed of a model: medians over the rounds with their extremes, and percentiles of single steps.

    Peak memory is that of a step in bytes, beyond weights, images and optimizer state. Ratios are to the first model.
    """

    model: str
    device: str = hidden()
    batch: int
    height: int
    width: int
    dtype: str = hidden()
    mode: str = hidden()
    compile: bool = hidden()
    channels_last: bool = hidden()
    params: int = column("params (M)", 1e6, 2)
    rounds: int = hidden()
    images_per_second: float = column("images/s", digits=1)
    images_per_second_lowest: float = column("lowest", digits=1)
    images_per_second_highest: float = column("highest", digits=1)
    latency_ms_p50: float = column("p50 (ms)", digits=1)
    latency_ms_p95: float = column("p95 (ms)", digits=1)
    latency_ms_p99: float = column("p99 (ms)", digits=1)
    peak_memory: int = megabytes("peak memory beyond weights, images and optimizer state")
    ratio: float = column("ratio", digits=2)
    ratio_lowest: float = hidden()
    ratio_highest: float = hidden()


@dataclass(kw_only=True)
class PeerSpeedRow(SpeedRow):
    """Speed, FLOPs and top-1: the papers', None for another model or size of image, or as a checkpoint records it."""

    flops_paper: int = column("FLOPs, paper (G)", 1e9, 2)
    flops_complete: int = column("FLOPs, complete (G)", 1e9, 2)
    paper_top1: float | None = column("top-1, the papers' (%)")
    own_top1: float | None = column("top-1 on its own data (%)")


@dataclass
class _Contender:
    name: str
    params: int
    step: Callable[[], None]
    peak_memory: int = 0
    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


def measure_throughput(
    names: Sequence[str], settings: Settings, progress: Progress = lambda text: None
) -> list[SpeedRow]:
    """Measure models in turns.

    Args:
        names: models of :func:`hatnet_analysis.load_model`; ratios are to the first.
        settings: how to measure.
        progress: called with one line before each piece of work.

    Raises:
        ValueError: if the device is missing, or a model cannot run with these settings.
    """
    device = checked_device(settings.device)
    contenders = []
    for name in names:
        progress(f"warming up {name}")
        contenders.append(_contender(name, settings, device))
    for i in range(settings.rounds):
        for j in range(len(contenders)):
            contender = contenders[(i + j) % len(contenders)]
            progress(f"round {i + 1} of {settings.rounds}: {contender.name}")
            _turn(contender, settings)
    return [_row(contender, contenders[0], settings) for contender in contenders]


def compare(names: Sequence[str], settings: Settings, progress: Progress = lambda text: None) -> list[PeerSpeedRow]:
    """Join throughput with FLOPs and the papers' top-1; arguments as for :func:`measure_throughput`."""
    rows = []
    for row in measure_throughput(names, settings, progress):
        name = row["model"]
        progress(f"counting {name}")
        with refusals(name, settings.size):
            total = count_flops(load_model(name, settings.size), *settings.size).total
        counts: dict[str, Any] = {"flops_paper": total.paper, "flops_complete": total.complete}
        top1: dict[str, Any] = {"paper_top1": paper_top1(name, settings.size), "own_top1": recorded_top1(name)}
        rows.append(PeerSpeedRow(**row, **counts, **top1))
    return rows


def paper_top1(name: str, size: tuple[int, int]) -> float | None:
    """Return the ImageNet top-1 (%) in Table 2 or the model's own paper at this size of image; not measured here."""
    # of a model that Table 2 has twice, the second row replaces the one with a star, its own paper's training
    known = {(model, (224, 224)): top1 for model, top1 in OTHER_TOP1.items()}
    known |= {(row.source, row.size): row.accuracy["top-1"] for row in printed("2")}
    return known.get((name, size))


def checked_device(name: str) -> torch.device:
    """Return a device that exists and whose memory can be measured; ``auto`` as for ``pick_device``.

    Raises:
        ValueError: naming it otherwise.
    """
    device = pick_device(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, whose memory can be measured, got {name!r}")
    return device


def _contender(name: str, settings: Settings, device: torch.device) -> _Contender:
    torch.manual_seed(0)
    with refusals(name, settings.size, settings.batch):
        model = load_model(name, settings.size)
        params = count_params(model)
        step = _step(model, settings, device)
        step()
        contender = _Contender(name, params, step, peak_memory(step, device))
        _turn(contender, settings)  # warm-up, and compiling for whatever a second step changes
    contender.rates.clear()
    contender.latencies.clear()
    return contender


def _step(model: nn.Module, settings: Settings, device: torch.device) -> Callable[[], None]:
    """Return a function that runs one batch and waits for it."""
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=memory_format).train(settings.train)  # type: ignore[call-overload]  # one format for all
    in_chans = getattr(model, "in_chans", 3)
    images = torch.randn(settings.batch, in_chans, *settings.size, device=device).to(memory_format=memory_format)
    run: Any = torch.compile(model) if settings.compile else model
    if not settings.train:
        return _inference(run, images, settings)
    return _training(run, model, images, settings)


def _inference(run: Any, images: Tensor, settings: Settings) -> Callable[[], None]:
    def step() -> None:
        with torch.inference_mode(), _autocast(settings, images.device):
            run(images)
        _synchronize(images.device)

    return step


def _training(run: Any, model: nn.Module, images: Tensor, settings: Settings) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    labels = torch.zeros(settings.batch, dtype=torch.long, device=images.device)

    def step() -> None:
        with _autocast(settings, images.device):
            logits = run(images)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise ValueError("only classifiers are trained here, whose output is [batch, classes]")
        torch.autograd.backward(F.cross_entropy(logits.float(), labels))
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(images.device)

    return step


def _autocast(settings: Settings, device: torch.device) -> AbstractContextManager[Any]:
    if settings.dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[settings.dtype])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _turn(contender: _Contender, settings: Settings) -> None:
    """Run steps until the turn has lasted long enough, at least two."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < settings.seconds:
        start = time.perf_counter()
        contender.step()
        times.append(time.perf_counter() - start)
    contender.rates.append(settings.batch * len(times) / sum(times))
    contender.latencies += times


def _row(contender: _Contender, first: _Contender, settings: Settings) -> SpeedRow:
    ratios = [a / b for a, b in zip(contender.rates, first.rates, strict=True)]
    milliseconds = torch.tensor(contender.latencies) * 1e3
    return SpeedRow(
        model=contender.name,
        device=settings.device,
        batch=settings.batch,
        height=settings.size[0],
        width=settings.size[1],
        dtype=settings.dtype,
        mode="training" if settings.train else "inference",
        compile=settings.compile,
        channels_last=settings.channels_last,
        params=contender.params,
        rounds=settings.rounds,
        peak_memory=contender.peak_memory,
        **{f"latency_ms_p{p}": milliseconds.quantile(p / 100).item() for p in (50, 95, 99)},
        **_spread("images_per_second", contender.rates),
        **_spread("ratio", ratios),
    )


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_lowest": min(values), f"{name}_highest": max(values)}
