"""A training step, forward and backward: speed and peak memory compared with the plain form and the peers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from contenders import OURS, PEERS, PLAIN, PLAIN_WHAT, Contender, Plan, ours, peers, speeds
from harness import Measurement, Ratio, Table, quotients
from torch import Tensor

from hatnet_analysis.memory import peak_memory


def measure_steps(args: argparse.Namespace) -> Measurement:
    """Speed at batch 8, memory at batch 32."""
    plan = Plan(rounds=args.rounds)
    what = f"""Forward and backward, 224×224, float32, eager: images per second at batch 8; most bytes of tensors
    beyond the model at batch 32. {PLAIN_WHAT}"""
    result = Measurement("Training", what, plan.settings())
    contenders = {PLAIN: ours(kernels="reference"), OURS: ours()} | peers()
    steps = {name: training_step(model) for name, model in contenders.items()}
    found = speeds(plan, steps, torch.randn(8, 3, 224, 224), "training")
    result.tables.append(Table("a step, batch 8", "images/s", found))
    result.ratios.append(Ratio("step, to plain", quotients(found[OURS], found[PLAIN]), at_least=1.5))
    result.ratios += [Ratio(f"step, to {peer}", quotients(found[OURS], found[peer])) for peer in PEERS]
    images = torch.randn(32, 3, 224, 224)
    memory = {name: [peak_memory(partial(step, images), images.device) / 1e9] for name, step in steps.items()}
    result.tables.append(Table("peak memory, batch 32", "GB", memory, digits=2))
    result.ratios.append(Ratio("memory, to plain", quotients(memory[OURS], memory[PLAIN]), at_most=0.6))
    return result


def training_step(model: Contender) -> Callable[[Tensor], None]:
    """Forward and backward in evaluation mode: without the dropout and stochastic depth in which the models differ."""
    parameters = list(model.parameters())

    def step(images: Tensor) -> None:
        with torch.enable_grad():
            targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
            torch.autograd.grad(F.cross_entropy(model(images).float(), targets), parameters)

    return step
