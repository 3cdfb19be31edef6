"""Measure the model's speed and memory on this machine: inference, training, high resolution, beside its peers.

Writes OUT/<date>-core.json and a readable .md. Close all else that runs. With --against, ratios are compared with
those of an earlier report, and the program fails where one has lost more than 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from report import Report
from results import Measurement, Ratio, Table, interleaved, quotients
from torch import Tensor, nn

from hatnet_analysis.memory import peak_memory
from hatnet_core import create_model, list_models, set_kernels

PACKAGES = ("hatnet-core", "torch", "timm")

PLAIN, OURS, COMPILED = "HAT-Net-Small, plain", "HAT-Net-Small", "HAT-Net-Small, compiled"

PEERS = {
    "Swin-T": "swin_tiny_patch4_window7_224",
    "PVTv2-B2": "pvt_v2_b2",
    "ConvNeXt-T": "convnext_tiny",
    "Twins-SVT-S": "twins_svt_small",
}
"""Models of timm; all but Twins (2.8 G) have about the 4.6 G multiply-adds of HAT-Net-Small."""

SIZES = (224, 512, 1024, 2048)

LOSS = 0.15
"""How much smaller than recorded a ratio may be."""

PLAIN_WHAT = """"plain" is `set_kernels("reference")`: NCHW, explicit softmax, the MLP layer by layer."""


def main() -> int:
    """Run the chosen measurements; 1 if a ratio has fallen behind the report it is compared with."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chosen", nargs="*", metavar="MEASUREMENT", help=f"any of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--against", metavar="FILE", type=Path, help="a report, .json, whose ratios must be kept")
    args = parser.parse_args()
    if unknown := set(args.chosen) - set(MEASUREMENTS):
        parser.error(f"no measurement {sorted(unknown)[0]}; expected any of {', '.join(MEASUREMENTS)}")
    if args.against is not None and not args.against.is_file():
        parser.error(f"no report {args.against}")
    chosen = [name for name in MEASUREMENTS if name in args.chosen] or list(MEASUREMENTS)
    report = Report(args.out, "core", chosen if args.chosen else [], PACKAGES)
    measured = {name: report.add(name, partial(MEASUREMENTS[name], args.rounds)) for name in chosen}
    print(f"\nwrote {report.path('.json')} and {report.path('.md')}")
    return 0 if args.against is None else _behind(measured, json.loads(args.against.read_text(encoding="utf-8")))


def _behind(measured: Mapping[str, Measurement], recorded: dict[str, Any]) -> int:
    """Print every ratio beside the recorded one; 1 if one lost too much."""
    failed = 0
    for name, measurement in measured.items():
        before = {ratio["name"]: ratio["median"] for ratio in recorded["measurements"].get(name, {}).get("ratios", [])}
        for ratio in measurement.ratios:
            if ratio.name not in before:
                continue
            now, then = statistics.median(ratio.rounds), before[ratio.name]
            lost = 1 - (then / now if ratio.at_most is not None else now / then)  # of memory, less is more
            failed |= lost > LOSS
            print(f"{'BEHIND' if lost > LOSS else 'kept'}: {ratio.name}: {now:.3f}, recorded {then:.3f}")
    return int(failed)


def _inference(rounds: int) -> Measurement:
    what = f"""Images a second, 224×224, float32, eager but where stated, contiguous images. {PLAIN_WHAT}"""
    result = Measurement("Inference", what, {"threads": torch.get_num_threads(), "rounds": rounds})
    for batch in (8, 1):
        models = _ours("hatnet_small") | {COMPILED: _model("hatnet_small", compiled=True)} | _peers()
        speeds = _speeds(models, batch, rounds, f"inference, batch {batch}")
        result.tables.append(Table(f"batch {batch}", "images/s", speeds))
        faster = [max(pair) for pair in zip(speeds["Swin-T"], speeds["PVTv2-B2"], strict=True)]
        result.ratios += [
            Ratio(f"to plain, batch {batch}", quotients(speeds[OURS], speeds[PLAIN]), at_least=1.7),
            Ratio(
                f"to the faster of Swin-T and PVTv2-B2, batch {batch}", quotients(speeds[OURS], faster), at_least=1.1
            ),
            Ratio(f"compiled to eager, batch {batch}", quotients(speeds[COMPILED], speeds[OURS]), at_least=1.0),
            Ratio(f"to ConvNeXt-T, batch {batch}", quotients(speeds[OURS], speeds["ConvNeXt-T"])),
        ]
    return result


def _variants(rounds: int) -> Measurement:
    what = f"""Images a second of all variants, 224×224, batch 8, float32, eager. {PLAIN_WHAT}"""
    result = Measurement("Variants", what, {"threads": torch.get_num_threads(), "rounds": rounds})
    for name in list_models():
        models = {name: _model(name), f"{name}, plain": _model(name, "reference")}
        speeds = _speeds(models, 8, rounds, name)
        result.tables.append(Table(name, "images/s", speeds))
        result.ratios.append(Ratio(f"{name} to plain", quotients(*speeds.values()), at_least=1.0))
    return result


def _bfloat16(rounds: int) -> Measurement:
    what = """Images a second under CPU autocast, 224×224, batch 8, eager. Processors with bfloat16 products (AMX,
    AVX512-BF16) gain from it, others lose."""
    flags = {"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    settings = {"rounds": rounds, "bfloat16 products of this processor": ", ".join(sorted(flags)) or "none"}
    result = Measurement("bfloat16", " ".join(what.split()), settings)
    models = {"float32": _model("hatnet_small"), "bfloat16": _model("hatnet_small", autocast=True)}
    speeds = _speeds(models, 8, rounds, "bfloat16")
    result.tables.append(Table("HAT-Net-Small", "images/s", speeds))
    result.ratios.append(Ratio("bfloat16 to float32", quotients(speeds["bfloat16"], speeds["float32"]), at_least=1.8))
    return result


def _training(rounds: int) -> Measurement:
    what = f"""Forward and backward, 224×224, float32, eager: images a second at batch 8; most bytes of tensors beyond
    the model at batch 32. {PLAIN_WHAT}"""
    settings = {"threads": torch.get_num_threads(), "rounds": rounds}
    result = Measurement("Training", " ".join(what.split()), settings)
    models = {name: _training_step(model) for name, model in (_ours("hatnet_small") | _peers()).items()}
    speeds = _speeds(models, 8, rounds, "training")
    result.tables.append(Table("a step, batch 8", "images/s", speeds))
    result.ratios.append(Ratio("step, to plain", quotients(speeds[OURS], speeds[PLAIN]), at_least=1.5))
    for peer in PEERS:
        result.ratios.append(Ratio(f"step, to {peer}", quotients(speeds[OURS], speeds[peer])))
    images = torch.randn(32, 3, 224, 224)
    memory = {name: [peak_memory(partial(model, images), images.device) / 1e9] for name, model in models.items()}
    result.tables.append(Table("peak memory, batch 32", "GB", memory, digits=2))
    result.ratios.append(Ratio("memory, to plain", quotients(memory[OURS], memory[PLAIN]), at_most=0.6))
    return result


def _resolution(rounds: int) -> Measurement:
    what = """One image, float32, eager: seconds of a forward pass, and most bytes of tensors beyond model and image.
    HAT-Net with the G1 and G2 of dense tasks, (8, 8, 8) and (16, 8, 4). A power of 1 is linear in the number of
    pixels, 2 quadratic."""
    result = Measurement("High resolution", " ".join(what.split()), {"rounds": rounds})
    seconds: dict[str, dict[int, list[float]]] = {}
    memory: dict[str, dict[int, float]] = {}
    for size in SIZES:
        image, models = torch.randn(1, 3, size, size), _at_size(size)
        turns = {name: partial(_seconds, model, image) for name, model in models.items()}
        for name, values in interleaved(turns, min(rounds, 3), f"{size}×{size}", warm_up=True).items():
            seconds.setdefault(name, {})[size] = values
            work = partial(_without_gradients, models[name], image)
            memory.setdefault(name, {})[size] = peak_memory(work, image.device)
    for size in SIZES:
        result.tables.append(Table(f"{size}×{size}", "s", {n: of[size] for n, of in seconds.items()}, digits=3))
        peaks = {name: [of[size] / 1e9] for name, of in memory.items()}
        result.tables.append(Table(f"{size}×{size}, peak memory", "GB", peaks, digits=3))
    for name in seconds:
        for a, b in pairwise(SIZES):
            growth = torch.tensor(seconds[name][b]).log().median() - torch.tensor(seconds[name][a]).log().median()
            power = growth.item() / (2 * torch.tensor(b / a).log().item())
            result.ratios.append(Ratio(f"power of the time of {name}, {a} to {b}", [power]))
    return result


MEASUREMENTS: dict[str, Callable[[int], Measurement]] = {
    "inference": _inference,
    "variants": _variants,
    "bfloat16": _bfloat16,
    "training": _training,
    "resolution": _resolution,
}

Model = Callable[[Tensor], Any]


def _ours(name: str) -> dict[str, Model]:
    return {PLAIN: _model(name, "reference"), OURS: _model(name)}


def _peers() -> dict[str, Model]:
    return {label: timm.create_model(name).eval() for label, name in PEERS.items()}


def _model(name: str, kernels: str = "auto", *, compiled: bool = False, autocast: bool = False) -> Model:
    """A model in evaluation mode that computes with these kernels whenever it is called."""
    torch.manual_seed(0)
    model = create_model(name).eval()
    run: Any = torch.compile(model) if compiled else model

    def call(images: Tensor) -> Any:
        set_kernels(kernels)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(images)

    call.parameters = model.parameters  # type: ignore[attr-defined]
    return call


def _training_step(model: Any) -> Model:
    """Forward and backward in evaluation mode: without the dropout and stochastic depth in which the models differ."""

    def step(images: Tensor) -> None:
        with torch.enable_grad():
            loss = F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long))
            torch.autograd.grad(loss, list(model.parameters()))

    return step


def _at_size(size: int) -> dict[str, Model]:
    torch.manual_seed(0)
    ours = create_model("hatnet_small", grid_sizes=(8, 8, 8), pool_sizes=(16, 8, 4)).eval()
    swin: nn.Module = timm.create_model(PEERS["Swin-T"], img_size=size).eval()
    set_kernels("auto")
    return {OURS: ours, "Swin-T": swin, "PVTv2-B2": timm.create_model(PEERS["PVTv2-B2"]).eval()}


def _speeds(models: Mapping[str, Model], batch: int, rounds: int, what: str) -> dict[str, list[float]]:
    """Images a second of turns of at least a second."""
    images = torch.randn(batch, 3, 224, 224)

    def turn(model: Model, _: int) -> float:
        start, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - start < 1.0:
            _without_gradients(model, images)
            count += 1
        return batch * count / (time.perf_counter() - start)

    return interleaved({name: partial(turn, model) for name, model in models.items()}, rounds, what, warm_up=True)


def _seconds(model: Model, image: Tensor, _: int) -> float:
    start = time.perf_counter()
    _without_gradients(model, image)
    return time.perf_counter() - start


def _without_gradients(model: Model, images: Tensor) -> None:
    with torch.no_grad():
        model(images)


if __name__ == "__main__":
    sys.exit(main())
