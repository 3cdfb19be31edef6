"""One group of the processes of a launch: :func:`join` begins it, :func:`joined` also ends it in order."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Store  # torch.distributed has them, but exports no types

from hatnet_train.distributed.environment import LAUNCHER_VARIABLES, Launch, discover
from hatnet_train.distributed.errors import LOST_CONTACT, AgreedError
from hatnet_train.distributed.heartbeat import ADVICE, Watch
from hatnet_train.distributed.rendezvous import master, roll_call
from hatnet_train.signals import Preempted

__all__ = ["LAUNCHER_VARIABLES", "AgreedError", "Launch", "discover", "join", "joined", "roll_call"]


def join(launch: Launch, timeout: float) -> Watch:
    """Call the roll, start the process group of torch and DeepSpeed, and take this process's device and cores.

    LAUNCHER_VARIABLES are set in ``os.environ``, for the libraries that read them.

    Args:
        launch: this process's place; from :func:`discover`.
        timeout: seconds, both for the roll call and for every later communication of the group.

    Returns:
        Heartbeat of this process, which has started.

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
    watch = Watch(own_connection, launch.rank, launch.world_size, master(launch), timeout)
    _start_group(launch, store, timeout)
    _share_cores(launch.local_world_size)
    return watch


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


def _start_group(launch: Launch, store: Store, timeout: float) -> None:
    """Start the process group of torch on the accelerator's backend, and DeepSpeed's use of it."""
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
