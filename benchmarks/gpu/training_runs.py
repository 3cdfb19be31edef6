"""Run hatnet-train under DeepSpeed on NCCL: every ZeRO stage in bf16 and fp16, and a run that is killed and resumed.

The runs learn scikit-learn's digits at 64 pixels, a few at a time. Two whole runs and one that is killed after a
checkpoint must end with the same weights, bit for bit, with deterministic algorithms. Rows go to
$OUT/training_runs.jsonl.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import DRY, record, say

ROOT = Path(tempfile.mkdtemp(prefix="hatnet-gpu-"))
DIGITS = ["--recipe", "digits", "--epochs", "1", "--checkpoint-steps", "1" if DRY else "20"]
DIGITS += ["--batch-size", "718", "--image-size", "32"] if DRY else ["--image-size", "64"]
STEP = "step-0000000001" if DRY else "step-0000000020"
"""The checkpoint after which a run is killed."""

DETERMINISTIC = """import sys, torch
torch.backends.cudnn.deterministic = True
torch.use_deterministic_algorithms(True, warn_only=True)
from hatnet_train.cli import train
sys.exit(train())"""


def start(out: Path, *more: str, deterministic: bool = False) -> subprocess.Popen[bytes]:
    """Start a run; its output goes to OUT.log."""
    command = [sys.executable, *(["-c", DETERMINISTIC] if deterministic else ["-m", "hatnet_train"])]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2"}
    environment.pop("TRITON_INTERPRET", None)
    with out.with_suffix(".log").open("ab") as log:
        command += [*DIGITS, "--out", str(out), *more]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def finish(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Its exit status; None if it was still running at the deadline, and was killed."""
    try:
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def end_of_log(out: Path) -> str:
    """The end of what a run printed."""
    return out.with_suffix(".log").read_text(errors="replace")[-700:]


def run(zero: int, precision: str, deadline: float) -> dict[str, Any]:
    """One run from start to end."""
    out = ROOT / f"zero{zero}-{precision}"
    status = finish(start(out, "--zero-stage", str(zero), "--precision", precision), deadline)
    row: dict[str, Any] = {"what": "digits", "zero": zero, "precision": precision, "status": status}
    if status != 0:
        return row | {"ok": False, "log": end_of_log(out)}
    metrics = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    names = ("train_loss", "eval_loss", "top1", "images_per_second", "memory_gb")
    return row | {"ok": DRY or metrics["top1"] > 15} | {name: metrics[name] for name in names}


def kill_and_resume(zero: int, deadline: float) -> dict[str, Any]:
    """Two whole runs and one that is killed after a checkpoint and resumed: how many final weights differ."""
    flags = ["--zero-stage", str(zero), "--precision", "fp32" if DRY else "bf16"]
    whole = [ROOT / f"exact-{name}" for name in ("first", "second")]
    broken = ROOT / "exact-killed"
    processes = [start(out, *flags, deterministic=True) for out in whole]
    process = start(broken, *flags, deterministic=True)
    while process.poll() is None and time.monotonic() < deadline and not (broken / "checkpoints" / STEP).is_dir():
        time.sleep(0.02)
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    statuses = [finish(p, deadline) for p in processes]
    statuses.append(finish(start(broken, *flags, "--resume", "auto", deterministic=True), deadline))
    row: dict[str, Any] = {"what": "killed and resumed", "zero": zero, "killed": killed, "statuses": statuses}
    if statuses != [0, 0, 0]:
        return row | {"ok": False, "log": end_of_log(broken)}
    repeated, resumed = differing(*whole), differing(whole[0], broken)
    return row | {"repeated_differs": repeated, "resumed_differs": resumed, "ok": killed and not repeated + resumed}


def differing(a: Path, b: Path) -> int:
    """Values of the final weights of two runs that are not identical."""
    from safetensors.torch import load_file

    one, other = (load_file(path / "model.safetensors") for path in (a, b))
    return sum(int((one[name] != other[name]).sum()) for name in one)


def main() -> int:
    """Return 1 if a run fails."""
    deadline = time.monotonic() + (3600 if DRY else float(sys.argv[1]) if len(sys.argv) > 1 else 240)
    runs = [(3, "fp32")] if DRY else [(zero, precision) for precision in ("fp16", "bf16") for zero in (3, 2, 1, 0)]
    failed = 0
    with ThreadPoolExecutor(1 if DRY else 3) as pool:
        futures = [pool.submit(kill_and_resume, 1, deadline), *(pool.submit(run, *r, deadline) for r in runs)]
        for future in futures:
            row = future.result()
            say("ok  " if row["ok"] else "FAIL", row)
            record("training_runs", row)
            failed += not row["ok"]
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
