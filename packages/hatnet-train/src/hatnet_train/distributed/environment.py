"""Environment of a launch: the place of this process, as torchrun, deepspeed, srun or MPI give it."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of torch's launchers; :func:`join` sets them for the libraries, whatever the launcher."""

DEFAULT_PORT = 29500
"""Port of rank 0 where nobody chose one; DeepSpeed's and torchrun's, too."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among the processes of a launch.

    Attributes:
        launcher: what said so: "torchrun", "deepspeed", "environment" (another one that sets RANK and so on),
            "openmpi", "mpich" (and Intel MPI), "slurm", or "none".
        rank: number of this process, from 0.
        local_rank: its number among the processes of its host, from 0.
        world_size: processes of the launch.
        local_world_size: processes of this host; where the launcher does not say, ``local_rank + 1``.
        master_addr: host name or address of rank 0.
        master_port: port on it where the processes meet.
    """

    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int


def discover(environ: Mapping[str, str]) -> Launch:
    """Read the environment of a process that a launcher started, or did not start.

    Where launchers are nested, such as torchrun in a step of srun, the inner one counts. A SLURM job without ``srun``
    has one process. MASTER_ADDR and MASTER_PORT of the environment go before what is derived from SLURM or MPI.

    Raises:
        ValueError: naming the variable, its value and what was expected; or the variables that are missing.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        return _from_torch_variables(environ)
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return _from_mpi(environ, "openmpi", "OMPI_COMM_WORLD_", ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    # mpiexec may start its own helpers with srun: what they inherit from SLURM is not about this process.
    if "PMI_SIZE" in environ and ("MPI_LOCALRANKID" in environ or "SLURM_STEP_NUM_TASKS" not in environ):
        return _from_mpi(environ, "mpich", "", ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"))
    if "SLURM_STEP_NUM_TASKS" in environ:
        return _from_slurm(environ)
    return _one_process("none")


def _from_torch_variables(environ: Mapping[str, str]) -> Launch:
    missing = [name for name in LAUNCHER_VARIABLES if name not in environ]
    if missing:
        names = ", ".join(LAUNCHER_VARIABLES)
        raise ValueError(f"the environment lacks {', '.join(missing)}; a launcher sets {names}")
    torchrun, deepspeed = "TORCHELASTIC_RUN_ID" in environ, "LOCAL_SIZE" in environ
    world_size = _integer(environ, "WORLD_SIZE", 1)
    local_rank = _integer(environ, "LOCAL_RANK", 0, world_size - 1)
    size_name = "LOCAL_WORLD_SIZE" if torchrun or not deepspeed else "LOCAL_SIZE"
    return Launch(
        launcher="torchrun" if torchrun else "deepspeed" if deepspeed else "environment",
        rank=_integer(environ, "RANK", 0, world_size - 1),
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=_integer(environ, size_name, local_rank + 1, world_size, local_rank + 1),
        master_addr=_host(environ),
        master_port=_integer(environ, "MASTER_PORT", 1, 65_535, DEFAULT_PORT),
    )


def _from_mpi(environ: Mapping[str, str], launcher: str, prefix: str, names: tuple[str, str, str, str]) -> Launch:
    rank_name, size_name, local_rank_name, local_size_name = (prefix + name for name in names)
    world_size = _integer(environ, size_name, 1)
    if world_size == 1:
        return _one_process(launcher)
    local_world_size = _integer(environ, local_size_name, 1, world_size)
    if local_world_size < world_size and "MASTER_ADDR" not in environ:
        raise ValueError(
            f"{size_name}={world_size}, {local_size_name}={local_world_size}: processes on several hosts must know "
            "where rank 0 is; export MASTER_ADDR, the name or address of its host, to all of them "
            "(mpirun -x MASTER_ADDR=HOST, or mpiexec -genv MASTER_ADDR HOST)"
        )
    return Launch(
        launcher=launcher,
        rank=_integer(environ, rank_name, 0, world_size - 1),
        local_rank=_integer(environ, local_rank_name, 0, local_world_size - 1),
        world_size=world_size,
        local_world_size=local_world_size,
        master_addr=_host(environ, "127.0.0.1"),
        master_port=_integer(environ, "MASTER_PORT", 1, 65_535, DEFAULT_PORT),
    )


def _from_slurm(environ: Mapping[str, str]) -> Launch:
    # SLURM_NTASKS and its like describe the job, also in a batch script that is one process: only the step counts.
    world_size = _integer(environ, "SLURM_STEP_NUM_TASKS", 1)
    if world_size == 1:
        return _one_process("slurm")
    counts = _tasks_per_node(environ)
    local_world_size = counts[_integer(environ, "SLURM_NODEID", 0, len(counts) - 1)]
    job, step = (_integer(environ, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return Launch(
        launcher="slurm",
        rank=_integer(environ, "SLURM_PROCID", 0, world_size - 1),
        local_rank=_integer(environ, "SLURM_LOCALID", 0, local_world_size - 1),
        world_size=world_size,
        local_world_size=local_world_size,
        master_addr=_host(environ, _first_host(environ)),
        # Steps that share a host differ in job or step. Linux hands out ports from 32768 on.
        master_port=_integer(environ, "MASTER_PORT", 1, 65_535, 20_000 + (7 * job + step) % 12_000),
    )


def _one_process(launcher: str) -> Launch:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Launch(launcher, 0, 0, 1, 1, "127.0.0.1", free.getsockname()[1])


def _tasks_per_node(environ: Mapping[str, str]) -> list[int]:
    """Tasks of each node of the step: "2(x3),1" is [2, 2, 2, 1]."""
    text = _present(environ, "SLURM_STEP_TASKS_PER_NODE")
    matches = [re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part) for part in text.split(",")]
    if None in matches:
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must be like '2(x3),1', got {text!r}")
    return [int(match[1]) for match in matches if match for _ in range(int(match[2] or 1))]


def _first_host(environ: Mapping[str, str]) -> str:
    """First host of the step's nodes: of "node[003-010,12],gpu-a", node003."""
    text = _present(environ, "SLURM_STEP_NODELIST")
    number = "[0-9]+(?:-[0-9]+)?"
    match = re.match(rf"(?:[^\s,\[\]]|\[{number}(?:,{number})*\])+(?=,|$)", text)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST must be like 'node[003-010,12],gpu-a', got {text!r}")
    return re.sub(r"\[([0-9]+)[^\]]*\]", r"\1", match[0])


def _integer(
    environ: Mapping[str, str], name: str, low: int, high: int | None = None, default: int | None = None
) -> int:
    value = _present(environ, name, None if default is None else str(default))
    # int() would take "1_0" and " 1", too.
    if not (value.isascii() and value.isdigit() and low <= int(value) and (high is None or int(value) <= high)):
        expected = f"from {low} up" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be a whole number {expected}, got {value!r}")
    return int(value)


def _present(environ: Mapping[str, str], name: str, default: str | None = None) -> str:
    value = environ.get(name, default)
    if value is None:
        names = ", ".join(LAUNCHER_VARIABLES)
        raise ValueError(f"the environment lacks {name}, which goes with the launcher's others; or set {names}")
    return value


def _host(environ: Mapping[str, str], default: str | None = None) -> str:
    host = _present(environ, "MASTER_ADDR", default)
    if not host or host != host.strip():
        raise ValueError(f"MASTER_ADDR must be the name or address of a host, got {host!r}")
    return host
