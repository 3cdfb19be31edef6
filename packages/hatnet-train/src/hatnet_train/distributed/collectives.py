"""Exchange of Python values between ranks, so that all raise the same error or none."""

from __future__ import annotations

import os
import socket
from typing import Any, TypeVar

import torch.distributed as dist

from hatnet_train.distributed.errors import AgreedError
from hatnet_train.distributed.heartbeat import compact_ranks

T = TypeVar("T")

_ABSENT = "(not given)"


def compare(facts: dict[str, str], **own: str) -> list[dict[str, Any]]:
    """Compare all processes with rank 0; all ranks call this.

    Args:
        facts: what must be equal everywhere, by name.
        own: what else is to be known of every process.

    Returns:
        The same on every rank: of each rank ``facts``, ``host``, ``pid`` and its ``own``.

    Raises:
        AgreedError: on every rank, naming each fact that differs, its ranks and their values next to that of rank 0.
    """
    mine = {"facts": facts, "host": socket.gethostname(), "pid": os.getpid(), **own}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if differences := _differences([process["facts"] for process in everyone]):
        raise AgreedError("; ".join(differences))
    return everyone


def raise_together(problem: str | None) -> None:
    """Stop all ranks with one message if some have a problem; all ranks call this, without a problem with None.

    Raises:
        AgreedError: on every rank, with the problems and the ranks that have them, if any has one.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    ranks = ranks_by([text or "" for text in problems])
    well = ranks.pop("", [])
    if len(ranks) == 1 and not well:
        raise AgreedError(problems[0])
    if ranks:
        raise AgreedError("; ".join(f"{compact_ranks(those)}: {text}" for text, those in ranks.items()))


def from_rank_0(value: T) -> T:
    """Return the value of rank 0 on every rank; all ranks call this."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _differences(facts: list[dict[str, str]]) -> list[str]:
    """One text for each fact that is not equal on all ranks."""
    texts = []
    for name in sorted({name for one in facts for name in one}):
        ranks = ranks_by([one.get(name, _ABSENT) for one in facts])
        if len(ranks) > 1:
            (first, _), *others = ranks.items()
            listed = "; ".join(f"{value} on {compact_ranks(those)}" for value, those in others)
            texts.append(f"{name} must be equal on all ranks: {first} on rank 0, but {listed}")
    return texts


def ranks_by(values: list[str]) -> dict[str, list[int]]:
    """Ranks by value, in the order of the first rank of each."""
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks
