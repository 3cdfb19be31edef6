"""Roll call of a launch: a host that did not start is named, instead of waited for without a word."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed has them, but exports no types

from hatnet_train.distributed.environment import Launch
from hatnet_train.distributed.heartbeat import compact_ranks

logger = logging.getLogger(__name__)

# The store keeps these: the name of the round that is open, and in each round "rank/N", "present", "verdict", "read".
_ROUND, _COMPLETE = "hatnet-train/round", "complete"
_PROGRESS_SECONDS = 10.0  # a wait that is longer than this is told once
_GRACE_SECONDS = 5.0  # for others to read a verdict before rank 0, which keeps it for them, ends
_CONNECT_SECONDS = 5.0  # for a single try to connect: a host that is not up yet may not answer at all
_RESOLVE_SECONDS = 30.0  # for a host name to become known: name services lag behind a new host


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
            f"rank {launch.rank} on {socket.gethostname()} lost {master(launch)} while the roll was called; "
            "if rank 0 ended, its own output says why"
        ) from error


def _open_store(launch: Launch, timeout: float) -> Store:
    """Open the store on rank 0, or connect to it."""
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
                    f"{me} cannot reach {master(launch)} within {patience:g} s ({error}); "
                    f"check {spelled if unknown else started}"
                ) from error
        if passed > _PROGRESS_SECONDS and not told:
            logger.info("%s waits for %s, up to %g s", me, master(launch), timeout, extra={"all_ranks": True})
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
            f"MASTER_ADDR={launch.master_addr} leads to another rank 0 than {signature()}; expected one rank 0 in a "
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
    name, holder, own, me = "", "", store, signature()
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
    holder = own.compare_set(f"rank/{rank}", "", signature()).decode()
    if holder == signature():
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


def signature() -> str:
    """Host and number of this process."""
    return f"{socket.gethostname()} (process {os.getpid()})"


def master(launch: Launch) -> str:
    """Name rank 0 and its address."""
    return f"rank 0 at {launch.master_addr}:{launch.master_port}"


def _pause(launch: Launch) -> float:
    """Seconds between two looks at the store; all ranks together look a few thousand times a second at most."""
    return 0.05 + launch.world_size / 4000
