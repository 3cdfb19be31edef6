"""How many images a second models take, side by side, and what they need for it.

Every round runs all models, one after the other, and begins with another one each time; a ratio is formed within a
round, so that what slows the machine for a while slows both sides of it. Only ratios mean anything on another machine.
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
from hatnet_analysis.models import load_model, refusals
from hatnet_analysis.peers import table_2
from hatnet_core.devices import pick_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

PERCENTILES = (50, 95, 99)

OTHER_TOP1 = {"timm/convnext_tiny": 82.1, "timm/convnext_small": 83.1, "timm/convnext_base": 83.8}
"""Top-1 at 224×224 of models beside Table 2, from their own paper (Liu et al., CVPR 2022, Table 1)."""

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
"""What :func:`compare` compares unless told otherwise: models of about the FLOPs of ours."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: ``cpu``, or ``cuda`` with or without an index.
        batch: images of one step.
        size: height and width in pixels.
        dtype: ``float32``, or one of the others under autocast.
        compile: whether ``torch.compile`` is used; compiling belongs to the warm-up.
        train: whether a step is forward, backward and AdamW instead of forward alone.
        channels_last: whether images and weights are in that memory format.
        rounds: how often every model has its turn.
        seconds: how long one turn lasts at least.
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


@dataclass
class _Contender:
    name: str
    params: int
    step: Callable[[], None]
    peak_memory: int = 0
    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)


def measure_throughput(
    names: Sequence[str], settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Measure models in turns.

    Args:
        names: as for :func:`hatnet_analysis.models.load_model`; ratios are against the first.
        settings: how.
        progress: takes one line before each piece of work.

    Returns:
        A row for each model: the settings, ``params``, ``images_per_second`` (median over the rounds) with its
        ``_lowest`` and ``_highest``, ``latency_ms_p50``, ``_p95`` and ``_p99`` of single steps, ``peak_memory``
        (bytes that a step holds at most beyond weights, images and optimizer state, which exist before it), ``ratio``
        of images a second to the first model, and its extremes.

    Raises:
        ValueError: if the device is not there, or a model cannot run so.
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


def compare(
    names: Sequence[str], settings: Settings, progress: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Throughput joined with FLOPs and with the top-1 that the papers state.

    Args:
        names: as for :func:`measure_throughput`.
        settings: likewise.
        progress: likewise.

    Returns:
        The rows of :func:`measure_throughput` with ``flops_paper``, ``flops_complete`` and ``paper_top1``, None for
        models of no known paper and at sizes other than that of the paper's figure.
    """
    rows = measure_throughput(names, settings, progress)
    for row in rows:
        progress(f"counting {row['model']}")
        with refusals(row["model"], settings.size):
            total = count_flops(load_model(row["model"], settings.size), *settings.size).total
        row |= {"flops_paper": total.paper, "flops_complete": total.complete}
        row["paper_top1"] = paper_top1(row["model"], settings.size)
    return rows


def paper_top1(name: str, size: tuple[int, int]) -> float | None:
    """ImageNet top-1 (%) as Table 2 or the model's own paper states it for this size of image; not measured here."""
    # of a model that Table 2 has twice, the row with a star, its own paper's training, stands before the other
    printed = {(row.source, row.size): row.accuracy["top-1"] for row in table_2()}
    others = {(model, (224, 224)): top1 for model, top1 in OTHER_TOP1.items()}
    return (others | printed).get((name, size))


def checked_device(name: str) -> torch.device:
    """A device that is there and whose memory is measured here; ``auto`` as for ``pick_device``.

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
    """What runs one batch and returns when it is done."""
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
    """Steps until the turn has lasted long enough, at least two."""
    times: list[float] = []
    while len(times) < 2 or sum(times) < settings.seconds:
        start = time.perf_counter()
        contender.step()
        times.append(time.perf_counter() - start)
    contender.rates.append(settings.batch * len(times) / sum(times))
    contender.latencies += times


def _row(contender: _Contender, first: _Contender, settings: Settings) -> dict[str, Any]:
    rates = contender.rates
    ratios = [a / b for a, b in zip(rates, first.rates, strict=True)]
    row: dict[str, Any] = {"model": contender.name, "device": settings.device, "batch": settings.batch}
    row |= {"height": settings.size[0], "width": settings.size[1], "dtype": settings.dtype}
    row |= {"mode": "training" if settings.train else "inference", "compile": settings.compile}
    row |= {"channels_last": settings.channels_last, "params": contender.params, "rounds": settings.rounds}
    row |= _spread("images_per_second", rates)
    milliseconds = torch.tensor(contender.latencies) * 1e3
    row |= {f"latency_ms_p{p}": milliseconds.quantile(p / 100).item() for p in PERCENTILES}
    return row | {"peak_memory": contender.peak_memory} | _spread("ratio", ratios)


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: statistics.median(values), f"{name}_lowest": min(values), f"{name}_highest": max(values)}
