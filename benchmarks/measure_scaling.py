"""From one process to two: images per second of real launches in which every process has one core of this machine."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import Measurement, Ratio, Table, quotients
from tqdm import tqdm

from hatnet_train.launch import LAUNCHER_VARIABLES

TIMEOUT = 600
"""Seconds after which a launch is ended."""

WORKER = Path(__file__).with_name("scaling_worker.py")

TITLE = "Scaling from one process to two"

WHAT = """DeepSpeed's launcher starts one process and two in turn. Every process has a core of its own and one thread,
so that two have twice the means of one; our Trainer trains on batches in memory. The efficiency is the rate of two
processes over twice the rate of one: with the same batch in all (strong), or with the same share of it in each process
(weak). Where a large batch is slower an image than a small one, the strong efficiency can be above 1; the weak one
tells what the communication costs. "PyTorch alone" trains the same model on the same share in each process without any
communication: what two cores of this machine can give that share its memory."""


@dataclass(frozen=True)
class Plan:
    """Extent of a measurement: model, pixels, images per process (of two), steps, turns, rounds."""

    variant: str = "hatnet_tiny"
    image_size: int = 224
    share: int = 8
    steps: int = 1
    turns: int = 2
    rounds: int = 4


QUICK = Plan(image_size=96, share=4, turns=1, rounds=1)


def measure(args: argparse.Namespace) -> Measurement:
    """Launch one process and two in turn."""
    plan = QUICK if args.quick else Plan()
    result = Measurement(TITLE, WHAT)
    if len(os.sched_getaffinity(0)) < 2:
        result.not_measured = "this process may use only one core"
        return result
    result.settings = {
        "model": f"{plan.variant} at {plan.image_size}×{plan.image_size}, fp32, ZeRO stage 0",
        "a launch": f"{plan.turns} turns of {plan.steps} step(s) of each loop, after one that does not count",
        "rounds": f"{plan.rounds}, in each a launch of one process and one of two; a value is the median of a launch",
    }
    seen: dict[tuple[int, str], list[float]] = {}
    with tqdm(total=2 * plan.rounds, desc="scaling", unit="launch") as bar:
        for number in range(plan.rounds):
            for processes in (1, 2) if number % 2 == 0 else (2, 1):
                for loop, rates in launch(processes, plan).items():
                    seen.setdefault((processes, loop), []).append(statistics.median(rates))
                bar.update()
    _judge(plan, seen, result)
    return result


def _judge(plan: Plan, seen: dict[tuple[int, str], list[float]], result: Measurement) -> None:
    """Add rates and efficiencies to ``result``."""
    share, whole = str(plan.share), str(2 * plan.share)
    rows = {
        f"our Trainer, 1 process, batch {whole}": seen[1, whole],
        f"our Trainer, 1 process, batch {share}": seen[1, share],
        f"our Trainer, 2 processes, batch {whole} in all": seen[2, whole],
        f"PyTorch alone, 1 process, batch {share}": seen[1, "alone"],
        f"PyTorch alone, 2 processes, batch {share} each": seen[2, "alone"],
    }
    result.tables.append(Table("all processes together", "images/s", rows, digits=2))
    strong, weak, alone = (
        [rate / 2 for rate in quotients(seen[2, two], seen[1, one])]
        for two, one in ((whole, whole), (whole, share), ("alone", "alone"))
    )
    result.ratios = [
        Ratio(f"efficiency, batch of {whole} in all (strong)", strong),
        Ratio(f"efficiency, batch of {share} a process (weak)", weak),
        Ratio("efficiency of PyTorch alone, without communication", alone),
        Ratio("weak efficiency / that of PyTorch alone", quotients(weak, alone)),
    ]


def launch(processes: int, plan: Plan) -> dict[str, list[float]]:
    """Run ``scaling_worker.py`` under DeepSpeed's launcher to its end; what it wrote.

    Raises:
        RuntimeError: with the end of its output, if it fails.
    """
    with TemporaryDirectory(prefix="hatnet-bench-") as scratch:
        out = Path(scratch) / "rates.json"
        sizes = [2 * plan.share] if processes == 2 else [2 * plan.share, plan.share]
        command = [Path(sys.executable).with_name("deepspeed"), "--num_accelerators", processes]
        command += ["--master_port", _free_port(), WORKER, "--out", out, "--batch-sizes", *sizes]
        for name in ("variant", "image_size", "steps", "turns"):
            command += [f"--{name.replace('_', '-')}", getattr(plan, name)]
        _run([str(part) for part in command])
        return json.loads(out.read_text())


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, so that a launcher ends with all that it launched
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise RuntimeError(f"a launch ended with status {process.returncode}:\n{output[-3000:]}")


def _free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
