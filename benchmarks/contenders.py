"""Contenders of ``core.py``: HAT-Net plain and fast, its peers from timm, each timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from harness import interleaved
from torch import Tensor, nn

from hatnet_core import create_model, set_kernels

PLAIN, OURS, COMPILED = "HAT-Net-Small, plain", "HAT-Net-Small", "HAT-Net-Small, compiled"

PLAIN_WHAT = """"plain" is `set_kernels("reference")`: NCHW, explicit softmax, the MLP layer by layer."""

PEERS = {
    "Swin-T": "swin_tiny_patch4_window7_224",
    "PVTv2-B2": "pvt_v2_b2",
    "ConvNeXt-T": "convnext_tiny",
    "Twins-SVT-S": "twins_svt_small",
}
"""Models of timm; all but Twins (2.8 G) have about the 4.6 G multiply-adds of HAT-Net-Small."""


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Plan:
    """Extent of a measurement: turns of each contender, least seconds per turn, device."""

    rounds: int = 7
    seconds: float = 1.0
    device: torch.device = CPU

    def settings(self) -> dict[str, Any]:
        """For the report."""
        return {"device": str(self.device), "threads": torch.get_num_threads(), "rounds": self.rounds}


class Contender(nn.Module):
    """A model in evaluation mode that computes with these kernels whenever it is called, images in their dtype.

    Args:
        model: [B, 3, H, W] → logits.
        kernels: as for ``set_kernels``.
        autocast: whether to compute in bfloat16 where autocast does.
    """

    def __init__(self, model: nn.Module, kernels: str = "auto", *, autocast: bool = False) -> None:
        super().__init__()
        self.model, self.kernels, self.autocast = model.eval(), kernels, autocast

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        set_kernels(self.kernels)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(images)


def ours(name: str = "hatnet_small", kernels: str = "auto", *, compiled: str = "", **options: Any) -> Contender:
    """HAT-Net of this name; ``compiled`` is a mode of torch.compile, the other options are :class:`Contender`'s."""
    torch.manual_seed(0)
    return _contender(create_model(name), compiled, kernels=kernels, **options)


def peers(*labels: str, compiled: str = "", **options: Any) -> dict[str, Contender]:
    """Models of timm by the labels of :data:`PEERS`, all of them without labels; else as :func:`ours`."""
    return {label: _contender(timm.create_model(PEERS[label]), compiled, **options) for label in labels or PEERS}


def _contender(model: nn.Module, compiled: str, **options: Any) -> Contender:
    return Contender(torch.compile(model, mode=compiled) if compiled else model, **options)


def speeds(
    plan: Plan, contenders: Mapping[str, Callable[[Tensor], Any]], images: Tensor, what: str
) -> dict[str, list[float]]:
    """Images a second, by contender, one value a round."""
    turns = {name: partial(_turn, plan, contender, images) for name, contender in contenders.items()}
    return interleaved(turns, plan.rounds, what, warm_up=True)


def seconds(contender: Callable[[Tensor], Any], images: Tensor, _: int = 0) -> float:
    """Of one call."""
    start = time.perf_counter()
    without_gradients(contender, images)
    wait_for(images.device)
    return time.perf_counter() - start


def without_gradients(contender: Callable[[Tensor], Any], images: Tensor) -> None:
    """Call it, as for inference; a training step turns the gradients on itself."""
    with torch.no_grad():
        contender(images)


def wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _turn(plan: Plan, contender: Callable[[Tensor], Any], images: Tensor, _: int) -> float:
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < plan.seconds:
        without_gradients(contender, images)
        count += 1
        wait_for(images.device)
    return len(images) * count / (time.perf_counter() - start)
