"""Inference outside PyTorch's eager mode: torch.compile with frozen weights, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from contenders import OURS, Contender, Plan, ours, peers, speeds
from harness import Measurement, Ratio, Table, quotients
from torch import Tensor, nn

WHAT = """Images a second, 224×224, float32, of HAT-Net-Small and Swin-T: PyTorch eager; compiled by inductor with
frozen weights (its option `freezing`); exported to ONNX for this batch and run by ONNX Runtime and by OpenVINO on as
many threads as PyTorch, their logits checked against those of eager."""

TOLERANCE = 1e-3
"""Of the largest logit: how far the logits of a runtime may be from those of PyTorch."""


def measure_deployment(args: argparse.Namespace) -> Measurement:
    """Measure every runtime at batch 1 and 8, compared with eager."""
    plan = Plan(rounds=args.rounds)
    settings = plan.settings() | {name: version(name) for name in ("onnxruntime", "openvino")}
    result = Measurement("Deployment on a CPU", WHAT, settings)
    for batch in (8, 1):
        images = torch.randn(batch, 3, 224, 224)
        contenders: dict[str, Callable[[Tensor], Any]] = {}
        with TemporaryDirectory(prefix="hatnet-bench-") as folder:
            for name, model in {OURS: ours(), **peers("Swin-T")}.items():
                contenders |= {f"{name}, {how}": run for how, run in _runtimes(model, images, Path(folder)).items()}
            found = speeds(plan, contenders, images, f"deployment, batch {batch}")
        result.tables.append(Table(f"batch {batch}", "images/s", found))
        for how in ("compiled, frozen", "ONNX Runtime", "OpenVINO"):
            for name in (OURS, "Swin-T"):
                ratio = quotients(found[f"{name}, {how}"], found[f"{name}, eager"])
                result.ratios.append(Ratio(f"{name}, {how} to eager, batch {batch}", ratio))
            ratio = quotients(found[f"{OURS}, {how}"], found[f"Swin-T, {how}"])
            result.ratios.append(Ratio(f"to Swin-T, both {how}, batch {batch}", ratio))
    return result


def _runtimes(model: Contender, images: Tensor, folder: Path) -> dict[str, Callable[[Tensor], Any]]:
    path = folder / "model.onnx"
    with torch.no_grad():
        expected = model(images).numpy()
        torch.onnx.export(model.model, (images,), path, dynamo=True, external_data=False, verbose=False)
    threads = torch.get_num_threads()
    runtimes = {
        "eager": model,
        "compiled, frozen": _frozen(model.model),
        "ONNX Runtime": _onnxruntime(path, threads),
        "OpenVINO": _openvino(path, threads),
    }
    for how, run in runtimes.items():
        with torch.no_grad():
            error = np.abs(np.asarray(run(images)) - expected).max() / np.abs(expected).max()
        if error > TOLERANCE:
            raise RuntimeError(f"{how}: logits are {error:.1e} of the largest apart; expected at most {TOLERANCE}")
    return runtimes


def _frozen(model: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(model, options={"freezing": True})
    return lambda images: compiled(images)


def _onnxruntime(path: Path, threads: int) -> Callable[[Tensor], np.ndarray[Any, Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images.numpy()})[0]


def _openvino(path: Path, threads: int) -> Callable[[Tensor], np.ndarray[Any, Any]]:
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda images: compiled(images.numpy())[0]
