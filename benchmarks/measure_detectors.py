"""RetinaNet at 800×1280 on HAT-Net compared with MMDetection's own backbones: parameters, FLOPs, time, peak memory."""

from __future__ import annotations

import argparse
import gc
import os
import resource
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Measurement, Ratio, Table, interleaved, quotients
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData

from hatnet_dense.config import load_config
from hatnet_dense.flops import build_model, count

OURS = "HAT-Net-Small"
CONFIGS = {
    OURS: "retinanet_hatnet-s_fpn_1x_coco",
    "ResNet-50": "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py",
    "PVT-Small": "mmdet::pvt/retinanet_pvt-s_fpn_1x_coco.py",
    "Swin-T": "mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py",
}
"""MMDetection's own configs, all of about the size of HAT-Net-Small."""

SIZE = (800, 1280)
ROUNDS = 3

WHAT = """RetinaNet 1x of MMDetection with four backbones of about one size, one image of 800×1280 random pixels with
ten boxes, fp32, random weights. FLOPs are the complete count (attention products included, one multiply-add is one
FLOP). "Inference" is backbone, neck and head without post-processing; "training step" is loss, backward pass and
AdamW. The backbones take turns, round by round. Peak memory is of a process that does nothing else (each in one of
its own, forked before any model was built): on a CPU the growth of its resident set, on a GPU what PyTorch allocated
at most."""


def measure(_: argparse.Namespace) -> Measurement:
    """Measure all backbones in turns."""
    warnings.simplefilter("ignore")
    result = Measurement("RetinaNet at 800×1280", WHAT)
    configs = {name: _config(path) for name, path in CONFIGS.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result.settings = {"device": str(device), "threads": torch.get_num_threads(), "rounds": ROUNDS}
    memory = {
        name: {kind: _in_a_process_of_its_own(config, kind) for kind in ("inference", "training step")}
        for name, config in configs.items()
    }
    counts = {name: count(config, *SIZE) for name, config in configs.items()}
    result.tables += [
        Table("parameters", "M", {name: [row["params"] / 1e6] for name, row in counts.items()}),
        Table("FLOPs", "G", {name: [row["flops_complete"] / 1e9] for name, row in counts.items()}),
    ]
    for kind in ("inference", "training step"):
        turns = {name: _turn(config, kind, device) for name, config in configs.items()}
        times = interleaved(turns, ROUNDS, kind, warm_up=True)
        result.tables.append(Table(f"time, {kind}", "s", times, digits=2))
        result.tables.append(
            Table(f"peak memory, {kind}", "GiB", {name: [memory[name][kind] / 2**30] for name in configs}, digits=2)
        )
        result.ratios += [
            Ratio(f"{kind}, time of {OURS} to {name}", quotients(times[OURS], times[name]))
            for name in configs
            if name != OURS
        ]
        del turns
        gc.collect()
    return result


def _config(path: str) -> Config:
    from mmengine.hub import get_config

    config = get_config(path) if "::" in path else load_config(path)
    config.model.backbone.init_cfg = None
    config.setdefault("default_scope", "mmdet")
    return config


def _turn(config: Config, kind: str, device: torch.device) -> Callable[[int], float]:
    """Return a function that runs one image through a model and returns the seconds."""
    model = build_model(config).to(device)
    image = torch.randn(1, 3, *SIZE, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    samples = [_sample(device)]

    def turn(_: int) -> float:
        _synchronize(device)
        start = time.perf_counter()
        if kind == "inference":
            with torch.inference_mode():
                model.eval()(image, mode="tensor")
        else:
            losses = model.train()(image, samples, mode="loss")
            total, _ = model.parse_losses(losses)
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
        _synchronize(device)
        return time.perf_counter() - start

    return turn


def _sample(device: torch.device) -> Any:
    """Ten boxes."""
    corners = torch.rand(10, 2, device=device) * 600
    boxes = torch.cat([corners, corners + 30 + torch.rand(10, 2, device=device) * 170], 1)
    sample = DetDataSample(
        metainfo={"img_shape": SIZE, "ori_shape": SIZE, "pad_shape": SIZE, "batch_input_shape": SIZE}
    )
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(80, (10,), device=device))
    return sample


def _in_a_process_of_its_own(config: Config, kind: str) -> float:
    """Bytes at the peak of two turns, beyond what the process had before the model was built."""
    if torch.cuda.is_available():  # a CUDA context does not survive a fork, and PyTorch counts there
        device = torch.device("cuda")
        turn = _turn(config, kind, device)
        torch.cuda.reset_peak_memory_stats()
        turn(0)
        turn(1)
        return float(torch.cuda.max_memory_allocated())
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before = _peak()
            turn = _turn(config, kind, torch.device("cpu"))
            turn(0)
            turn(1)
            os.write(writer, str(_peak() - before).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as file:
        text = file.read()
    if not text:
        raise RuntimeError(f"the process that measured the memory of {kind} ended early")
    return float(text)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
