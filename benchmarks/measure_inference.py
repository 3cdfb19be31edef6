"""Inference on a CPU: HAT-Net compared with its plain form and its peers; all variants; bfloat16; high resolution."""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import timm
import torch
from contenders import (
    COMPILED,
    OURS,
    PEERS,
    PLAIN,
    PLAIN_WHAT,
    Contender,
    Plan,
    ours,
    peers,
    seconds,
    speeds,
    without_gradients,
)
from harness import Measurement, Ratio, Table, interleaved, quotients

from hatnet_analysis.memory import peak_memory
from hatnet_core import create_model, list_models

SIZES = (224, 512, 1024, 2048)

POWER = 1.25
"""Of the number of pixels, with which time and memory may grow; Eq. 15 has 1, plus a share of the global attention."""


def measure_inference(args: argparse.Namespace) -> Measurement:
    """Measure Small and its peers at batch 8 and 1, eager and compiled."""
    plan = Plan(rounds=args.rounds)
    what = f"""Images a second, 224×224, float32, eager but where stated, contiguous images. {PLAIN_WHAT}"""
    result = Measurement("Inference", what, plan.settings())
    for batch in (8, 1):
        models = {PLAIN: ours(kernels="reference"), OURS: ours(), COMPILED: ours(compiled="default")} | peers()
        found = speeds(plan, models, torch.randn(batch, 3, 224, 224), f"inference, batch {batch}")
        result.tables.append(Table(f"batch {batch}", "images/s", found))
        faster = [max(pair) for pair in zip(found["Swin-T"], found["PVTv2-B2"], strict=True)]
        result.ratios += [
            Ratio(f"to plain, batch {batch}", quotients(found[OURS], found[PLAIN]), at_least=1.7),
            Ratio(
                f"to the faster of Swin-T and PVTv2-B2, batch {batch}", quotients(found[OURS], faster), at_least=1.1
            ),
            Ratio(f"compiled to eager, batch {batch}", quotients(found[COMPILED], found[OURS]), at_least=1.0),
            *(Ratio(f"to {peer}, batch {batch}", quotients(found[OURS], found[peer])) for peer in PEERS),
        ]
    return result


def measure_variants(args: argparse.Namespace) -> Measurement:
    """Measure every variant and its plain form at batch 8 and 1."""
    plan = Plan(rounds=args.rounds)
    what = f"""Images a second of all variants, 224×224, float32, eager. {PLAIN_WHAT}"""
    result = Measurement("Variants", what, plan.settings())
    for batch in (8, 1):
        for name in list_models():
            models = {name: ours(name), f"{name}, plain": ours(name, "reference")}
            found = speeds(plan, models, torch.randn(batch, 3, 224, 224), f"{name}, batch {batch}")
            result.tables.append(Table(f"{name}, batch {batch}", "images/s", found))
            result.ratios.append(Ratio(f"{name} to plain, batch {batch}", quotients(*found.values()), at_least=1.0))
    return result


def measure_bfloat16(args: argparse.Namespace) -> Measurement:
    """Autocast against float32, plain and fast."""
    plan = Plan(rounds=args.rounds)
    what = f"""Images a second of HAT-Net-Small under CPU autocast, 224×224, batch 8, eager. Processors with bfloat16
    products (AMX, AVX512-BF16) gain from it, others lose. {PLAIN_WHAT}"""
    about = Path("/proc/cpuinfo")
    flags = {"amx_bf16", "avx512_bf16"} & set(about.read_text(encoding="utf-8").split() if about.is_file() else [])
    settings = plan.settings() | {"bfloat16 products of this processor": ", ".join(sorted(flags)) or "none"}
    result = Measurement("bfloat16", what, settings)
    models = {
        "float32": ours(),
        "bfloat16": ours(autocast=True),
        "float32, plain": ours(kernels="reference"),
        "bfloat16, plain": ours(kernels="reference", autocast=True),
    }
    found = speeds(plan, models, torch.randn(8, 3, 224, 224), "bfloat16")
    result.tables.append(Table("HAT-Net-Small", "images/s", found))
    result.ratios += [
        Ratio("bfloat16 to float32", quotients(found["bfloat16"], found["float32"]), at_least=1.8),
        Ratio("bfloat16 to plain bfloat16", quotients(found["bfloat16"], found["bfloat16, plain"])),
    ]
    return result


def measure_resolution(args: argparse.Namespace) -> Measurement:
    """Time and memory from 224² to 2048²."""
    plan = Plan(rounds=args.rounds)
    what = """One image, float32, eager: seconds of a forward pass, and most bytes of tensors beyond model and image.
    HAT-Net with the G1 and G2 of dense tasks, (8, 8, 8) and (16, 8, 4). A power of 1 is linear in the number of
    pixels, 2 quadratic."""
    plan = replace(plan, rounds=min(plan.rounds, 3))
    result = Measurement("High resolution", what, plan.settings())
    times: dict[str, dict[int, list[float]]] = {}
    memory: dict[str, dict[int, float]] = {}
    for size in SIZES:
        image, models = torch.randn(1, 3, size, size), _at_size(size)
        turns = {name: partial(seconds, model, image) for name, model in models.items()}
        for name, values in interleaved(turns, plan.rounds, f"{size}×{size}", warm_up=True).items():
            times.setdefault(name, {})[size] = values
            work = partial(without_gradients, models[name], image)
            memory.setdefault(name, {})[size] = peak_memory(work, image.device) / 1e9
    for size in SIZES:
        result.tables.append(Table(f"{size}×{size}", "s", {n: of[size] for n, of in times.items()}, digits=3))
        peaks = {name: [of[size]] for name, of in memory.items()}
        result.tables.append(Table(f"{size}×{size}, peak memory", "GB", peaks, digits=3))
    for what, found in (("time", times), ("memory", {n: {s: [g] for s, g in of.items()} for n, of in memory.items()})):
        for name, of in found.items():
            for a, b in pairwise(SIZES):
                target = POWER if name == OURS else None
                power = [_power(of, a, b)]
                result.ratios.append(Ratio(f"power of the {what} of {name}, {a} to {b}", power, at_most=target))
    return result


def _power(values: dict[int, list[float]], a: int, b: int) -> float:
    """Return the exponent p of a growth with the number of pixels to the p, from a² to b²."""
    return math.log(statistics.median(values[b]) / statistics.median(values[a])) / (2 * math.log(b / a))


def _at_size(size: int) -> dict[str, Contender]:
    torch.manual_seed(0)
    dense = create_model("hatnet_small", grid_sizes=(8, 8, 8), pool_sizes=(16, 8, 4))
    swin = Contender(timm.create_model(PEERS["Swin-T"], img_size=size))
    return {OURS: Contender(dense), "Swin-T": swin} | peers("PVTv2-B2")
