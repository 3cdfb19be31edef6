"""Who am I among the processes of this launch, and are all of them here.

:func:`discover` reads what a launcher says to each process, :func:`join` makes the processes one group: first they
call the roll, so that a host that did not start is named instead of waited for without a word. torchrun, the deepspeed
launcher, ``srun``, ``mpirun`` and ``mpiexec`` are known; a process that none of them started is alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from hatnet_train.errors import LOST_CONTACT
from hatnet_train.signals import Preempted
from hatnet_train.watch import ADVICE, Watch, compact_ranks

logger = logging.getLogger(__name__)

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torch's launchers tell each process, and :func:`join` the libraries, whatever the launcher."""

DEFAULT_PORT = 29500
"""Port of rank 0 where nobody chose one; DeepSpeed's and torchrun's, too."""

# The store keeps these: the name of the round that is open, and in each round "rank/N", "present", "verdict", "read".
_ROUND, _COMPLETE = "hatnet-train/round", "complete"
_PROGRESS_SECONDS = 10.0  # a wait that is longer than this is told once
_GRACE_SECONDS = 5.0  # for others to read a verdict before rank 0, which keeps it for them, ends
_CONNECT_SECONDS = 5.0  # for a single try to connect: a host that is not up yet may not answer at all
_RESOLVE_SECONDS = 30.0  # for a host name to become known: name services lag behind a new host


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


def join(launch: Launch, timeout: float) -> Watch:
    """Call the roll, start the process group of torch and DeepSpeed, and take this process's device and cores.

    LAUNCHER_VARIABLES are set in ``os.environ``, for the libraries that read them.

    Args:
        launch: this process's place; from :func:`discover`.
        timeout: seconds, both for the roll call and for every later communication of the group.

    Returns:
        This process's signs of life, which began.

    Raises:
        ValueError: if the timeout is not positive, two processes have one place, or there is no accelerator for one.
        TimeoutError: if a rank did not come in time, with its number, on every rank that did.
        ConnectionError: if rank 0 cannot be reached or listen, or the processes cannot connect to each other.
    """
    if not 0 < timeout < float("inf"):
        raise ValueError(f"the timeout must be a positive number of seconds, got {timeout}")
    values = (launch.rank, launch.local_rank, launch.world_size, launch.master_addr, launch.master_port)
    os.environ.update(zip(LAUNCHER_VARIABLES, map(str, values), strict=True))
    store = roll_call(launch, timeout)
    own_connection = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    watch = Watch(own_connection, launch.rank, launch.world_size, _master(launch), timeout)
    _start_group(launch, store, timeout)
    _share_cores(launch.local_world_size)
    return watch


class AgreedError(ValueError):
    """What all ranks raise alike: none waits for another, so that all can leave in order."""


@contextlib.contextmanager
def joined(launch: Launch, timeout: float) -> Iterator[Watch]:
    """:func:`join`, and the end of the process group afterwards: together, unless this rank alone has failed.

    Together are those of AgreedError, FloatingPointError and Preempted, which all ranks raise alike, too.

    Raises:
        ConnectionError: if the communication with another process fails, naming those that are gone or hang.
    """
    watch = join(launch, timeout)
    try:
        yield watch
        torch.distributed.barrier()
    except (AgreedError, FloatingPointError, Preempted):
        torch.distributed.barrier()
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and re.search(LOST_CONTACT, str(error)):
            raise ConnectionError(f"{watch.culprits()}; {ADVICE}") from error
        watch.tell(str(error).partition("\n")[0])
        raise
    finally:
        watch.end()
        torch.distributed.destroy_process_group()


def roll_call(launch: Launch, timeout: float) -> Store:
    """Wait until every rank of the launch is here; all ranks call this.

    Rank 0 opens a store (under torchrun, the agent has) and a round in it; every rank writes its host and process
    number there; rank 0 counts and gives its verdict to all.

    Args:
        launch: this process's place.
        timeout: seconds that rank 0 waits for the others, and they for rank 0.

    Returns:
        A part of the store that only this launch has ever used.

    Raises:
        ValueError: if two processes have one place, or ``master_addr`` does not lead to rank 0.
        TimeoutError: naming the missing ranks, and those present with their hosts.
        ConnectionError: if rank 0 cannot be reached or cannot listen, or ends while others wait.
    """
    store = _open_store(launch, timeout)
    try:
        return _call(store, launch, timeout) if launch.rank == 0 else _answer(store, launch, timeout)
    except torch.distributed.DistError as error:
        raise ConnectionError(
            f"rank {launch.rank} on {socket.gethostname()} lost {_master(launch)} while the roll was called; "
            "if rank 0 ended, its own output says why"
        ) from error


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
        # Steps that share a host differ in job or step. Linux hands out ports from 32768 on by itself.
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


def _open_store(launch: Launch, timeout: float) -> Store:
    """Rank 0's own store, or a connection to it."""
    agent_has_it = launch.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if launch.rank > 0 or agent_has_it:
        return _connect(launch, timeout)
    limit = timedelta(seconds=timeout + _GRACE_SECONDS)
    try:
        return TCPStore("127.0.0.1", launch.master_port, None, True, limit, wait_for_workers=False)
    except torch.distributed.DistError as error:
        raise ConnectionError(
            f"rank 0 cannot listen on port {launch.master_port} of {socket.gethostname()}: "
            f"{str(error).rpartition('message: ')[2]}; expected a free port, such as another MASTER_PORT"
        ) from error


def _connect(launch: Launch, timeout: float) -> Store:
    """Connect to rank 0, which may start up to ``timeout`` seconds after this process.

    A plain socket looks whether the port is open first: torch's own client would fill the log until it is.
    """
    me, address, port = f"rank {launch.rank} on {socket.gethostname()}", launch.master_addr, launch.master_port
    limit, told, start = timedelta(seconds=timeout + _GRACE_SECONDS), launch.local_rank != 0, time.monotonic()
    while True:
        passed = time.monotonic() - start
        try:
            socket.create_connection((address, port), min(_CONNECT_SECONDS, max(1.0, timeout - passed))).close()
            return TCPStore(address, port, None, False, limit, wait_for_workers=False)
        except (OSError, torch.distributed.DistError) as error:
            unknown = isinstance(error, socket.gaierror)
            patience = min(timeout, _RESOLVE_SECONDS) if unknown else timeout
            if passed > patience:
                started = "that MASTER_ADDR is the host on which rank 0 starts, and that nothing blocks the port"
                spelled = "its spelling in MASTER_ADDR, and that the name service of this host knows it"
                raise ConnectionError(
                    f"{me} cannot reach {_master(launch)} within {patience:g} s ({error}); "
                    f"check {spelled if unknown else started}"
                ) from error
        if passed > _PROGRESS_SECONDS and not told:
            logger.info("%s waits for %s, up to %g s", me, _master(launch), timeout, extra={"all_ranks": True})
            told = True
        time.sleep(_pause(launch))


def _call(store: Store, launch: Launch, timeout: float) -> Store:
    """Rank 0: open a round, count, give the verdict."""
    name = uuid.uuid4().hex
    own = PrefixStore(name, store)
    _claim(own, 0)
    store.set(_ROUND, name)
    # Others reach rank 0 by its address; so must rank 0, or they would meet somebody else.
    if launch.world_size > 1 and _connect(launch, timeout).get(_ROUND).decode() != name:
        raise ValueError(
            f"MASTER_ADDR={launch.master_addr} leads to another rank 0 than {_signature()}; expected one rank 0 in a "
            "launch, and an address of its host"
        )
    missing = _wait_for_all(own, launch, timeout)
    verdict = _absence(own, launch, missing, timeout) if missing else _COMPLETE
    own.set("verdict", verdict)
    start, readers = time.monotonic(), launch.world_size - 1 - len(missing)
    while own.add("read", 0) < readers and time.monotonic() - start < _GRACE_SECONDS:
        time.sleep(_pause(launch))
    store.set(_ROUND, "")  # the store of an agent stays, and the next round must not take this one for its own
    if missing:
        raise TimeoutError(verdict)
    return own


def _answer(store: Store, launch: Launch, timeout: float) -> Store:
    """Other ranks: answer in the round that rank 0 opened, wait for the verdict.

    The store of torchrun's agent may still show a round of before a restart: then a new round comes, and counts.
    """
    name, holder, own, me = "", "", store, _signature()
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        current = store.get(_ROUND).decode() if name or store.check([_ROUND]) else ""
        if current not in ("", name):
            name, own = current, PrefixStore(current, store)
            holder = _claim(own, launch.rank)
            deadline = time.monotonic() + timeout + _GRACE_SECONDS
        if name and holder != me and launch.launcher != "torchrun":
            raise ValueError(f"two processes are rank {launch.rank}: {holder} and {me}; expected a rank for each")
        if holder == me and own.check(["verdict"]):
            own.add("read", 1)
            verdict = own.get("verdict").decode()
            if verdict != _COMPLETE:
                raise TimeoutError(verdict)
            return own
        time.sleep(_pause(launch))
    raise TimeoutError(
        f"rank {launch.rank} on {socket.gethostname()} reached {launch.master_addr}:{launch.master_port}, but rank 0 "
        f"did not {'end' if name else 'begin'} the roll call within {timeout:g} s"
    )


def _claim(own: Store, rank: int) -> str:
    """Take the place of ``rank`` in a round, if it is free; returns who holds it now."""
    holder = own.compare_set(f"rank/{rank}", "", _signature()).decode()
    if holder == _signature():
        own.add("present", 1)
    return holder


def _wait_for_all(own: Store, launch: Launch, timeout: float) -> list[int]:
    """Wait for every rank, at most ``timeout`` seconds; returns the ranks that are missing then."""
    start, told = time.monotonic(), False
    while own.add("present", 0) < launch.world_size:
        passed = time.monotonic() - start
        if passed > timeout or (passed > _PROGRESS_SECONDS and not told):
            missing = [rank for rank in range(launch.world_size) if not own.check([f"rank/{rank}"])]
            if passed > timeout:
                return missing
            absent = f"{compact_ranks(missing)} of {launch.world_size} processes"
            logger.info("waiting for %s, up to %g s", absent, timeout, extra={"all_ranks": True})
            told = True
        time.sleep(_pause(launch))
    return []


def _absence(own: Store, launch: Launch, missing: list[int], timeout: float) -> str:
    hosts: dict[str, list[int]] = {}
    for rank in sorted(set(range(launch.world_size)) - set(missing)):
        host = own.get(f"rank/{rank}").decode().partition(" ")[0]
        hosts.setdefault(host, []).append(rank)
    present = "; ".join(f"{compact_ranks(ranks)} on {host}" for host, ranks in hosts.items())
    return (
        f"{len(missing)} of {launch.world_size} processes did not come within {timeout:g} s: {compact_ranks(missing)} "
        f"missing; present: {present}; check that the missing ones were started, and that they reach "
        f"{launch.master_addr}:{launch.master_port}"
    )


def _signature() -> str:
    return f"{socket.gethostname()} (process {os.getpid()})"


def _master(launch: Launch) -> str:
    return f"rank 0 at {launch.master_addr}:{launch.master_port}"


def _pause(launch: Launch) -> float:
    """Seconds between two looks at the store; all ranks together look a few thousand times a second at most."""
    return 0.05 + launch.world_size / 4000


def _start_group(launch: Launch, store: Store, timeout: float) -> None:
    """The process group of torch on the accelerator's backend, and DeepSpeed's use of it."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel("WARNING")
    # Only DeepSpeed's inference uses this kernel, and to compile it takes 1.5 minutes in every new environment.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator = get_accelerator()
    device_id = None
    if accelerator.device_name() != "cpu":
        count = accelerator.device_count()
        if 1 < count <= launch.local_rank:
            host = socket.gethostname()
            raise ValueError(f"{host} shows {count} accelerators, too few for local rank {launch.local_rank}")
        index = launch.local_rank if count > 1 else 0  # SLURM may show each process one of its own
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed takes its device from here
        accelerator.set_device(index)
        if accelerator.device_name() == "cuda" and launch.world_size > 1:
            device_id = accelerator.device(index)  # as DeepSpeed would: NCCL connects now, and knows its device
    try:
        torch.distributed.init_process_group(
            accelerator.communication_backend_name(),
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timedelta(seconds=timeout),
            device_id=device_id,
        )
    except RuntimeError as error:
        raise ConnectionError(
            f"rank {launch.rank} on {socket.gethostname()} met the others at {launch.master_addr}, but they cannot "
            f"connect to each other ({error}); set GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to the network "
            "interface that the hosts share"
        ) from error
    deepspeed.init_distributed()


def _share_cores(processes: int) -> None:
    """On a CPU, divide the cores between the processes of this host, unless OMP_NUM_THREADS has said how.

    More threads than cores would wait for each other in every parallel region.
    """
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // processes))
