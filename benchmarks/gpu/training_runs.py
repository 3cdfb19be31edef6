"""Run hatnet-train under DeepSpeed on NCCL: every ZeRO stage in bf16 and fp16, and a run that is killed and resumed.

The runs learn scikit-learn's digits at 64 pixels, a few at a time. Two whole runs and one that is killed after a
checkpoint must end with the same weights, bit for bit, with ``--deterministic``. Rows go to
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

STARTED: list[subprocess.Popen[bytes]] = []


def start(out: Path, *more: str) -> subprocess.Popen[bytes]:
    """Start a run; its output goes to OUT.log."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "hatnet_train", *DIGITS, "--out", str(out), *more]
    with out.with_suffix(".log").open("ab") as log:
        STARTED.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
    return STARTED[-1]


def end_all(*_: object) -> None:
    """Kill every run that is still there, where this script is ended."""
    for process in STARTED:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    os._exit(143)


def finish(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Its exit status; None if it was still running at the deadline, and was killed."""
    try:
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def end_of_log(out: Path) -> str:
    """Return the end of what a run printed."""
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
    return row | {"ok": DRY or metrics["top1"] > 80} | {name: metrics[name] for name in names}


def kill_and_resume(zero: int, deadline: float) -> dict[str, Any]:
    """Two whole runs and one that is killed after a checkpoint and resumed: how many final weights differ."""
    flags = ["--deterministic", "--zero-stage", str(zero), "--precision", "fp32" if DRY else "bf16"]
    whole = [ROOT / f"exact-{name}" for name in ("first", "second")]
    broken = ROOT / "exact-killed"
    processes = [start(out, *flags) for out in whole]
    process = start(broken, *flags)
    while process.poll() is None and time.monotonic() < deadline and not (broken / "checkpoints" / STEP).is_dir():
        time.sleep(0.02)
    killed = process.poll() is None
    if killed:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    statuses = [finish(p, deadline) for p in processes]
    statuses.append(finish(start(broken, *flags, "--resume", "auto"), deadline))
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
    signal.signal(signal.SIGTERM, end_all)
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
