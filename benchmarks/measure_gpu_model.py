"""HAT-Net-Small on a GPU in bfloat16: inference and training beside its peers, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from contenders import COMPILED, OURS, PEERS, PLAIN, PLAIN_WHAT, Contender, Plan, ours, peers, speeds
from measure_steps import training_step
from results import Measurement, Ratio, Table, quotients
from torch import Tensor

from hatnet_analysis.memory import peak_memory

WHAT = f"""Images a second, 224×224, bfloat16: inference with the weights in bfloat16, training steps (forward and
backward) under autocast with weights in float32. HAT-Net-Small eager, compiled by inductor, and compiled with CUDA
graphs; the peers compiled. {PLAIN_WHAT}"""

GRAPHS = "HAT-Net-Small, CUDA graphs"

PAPER_MEMORY = 20.2
"""GB that a training step of 128 images took the authors."""


def measure_gpu(plan: Plan, *, batches: tuple[int, ...] = (256, 1), training_batch: int = 128) -> Measurement:
    """Inference, training and its memory."""
    result = Measurement("GPU", " ".join(WHAT.split()), plan.settings())
    for batch in batches:
        models = {GRAPHS: ours(compiled="reduce-overhead"), **_contenders()}
        models = {name: model.to(plan.device, torch.bfloat16) for name, model in models.items()}
        images = torch.randn(batch, 3, 224, 224, device=plan.device, dtype=torch.bfloat16)
        found = speeds(plan, models, images, f"inference, batch {batch}")
        _add(result, f"inference, batch {batch}", found)
    images = torch.randn(training_batch, 3, 224, 224, device=plan.device)
    steps: dict[str, Callable[[Tensor], Any]] = {
        name: training_step(model.to(plan.device)) for name, model in _contenders(autocast=True).items()
    }
    _add(result, f"training, batch {training_batch}", speeds(plan, steps, images, "training"))
    memory = {name: [peak_memory(partial(step, images), images.device) / 1e9] for name, step in steps.items()}
    result.tables.append(Table(f"training, batch {training_batch}, peak memory", "GB", memory, digits=2))
    result.ratios.append(Ratio("memory, to the authors' 20.2 GB", [memory[OURS][0] / PAPER_MEMORY], at_most=0.5))
    return result


def _contenders(**options: Any) -> dict[str, Contender]:
    return {
        PLAIN: ours(kernels="reference", **options),
        f"{PLAIN}, compiled": ours(kernels="reference", compiled="default", **options),
        OURS: ours(**options),
        COMPILED: ours(compiled="default", **options),
        **peers(compiled="default", **options),
    }


def _add(result: Measurement, title: str, found: dict[str, list[float]]) -> None:
    result.tables.append(Table(title, "images/s", found))
    best = found[COMPILED]
    result.ratios.append(Ratio(f"{title}, to plain compiled", quotients(best, found[f"{PLAIN}, compiled"])))
    result.ratios += [Ratio(f"{title}, to {peer}", quotients(best, found[peer]), at_least=1.0) for peer in PEERS]
