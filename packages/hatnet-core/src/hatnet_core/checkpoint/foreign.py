"""Find the weights of a HAT-Net in the content of any file, by the names of its parameters.

:func:`find_weights` searches every dict of a file for the names of :class:`HATNet` or of the released files, under any
prefix: that of ``torch.compile``, data parallelism, a Lightning module, a detector's backbone, a moving average.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hatnet_core.checkpoint.matching import abbreviate
from hatnet_core.checkpoint.released import rename_released

logger = logging.getLogger("hatnet_core")

WRAPPERS = ("state_dict", "model", "module")
"""Keys that are preferred, in this order, where a file contains several sets of weights; DeepSpeed's is ``module``."""

AVERAGE = re.compile(r"(^|_)(ema|average|averaged|teacher)($|_)")
"""Matches keys of moving averages, which come last."""

MARKERS = (
    "stem.conv1.weight",
    "stem.conv2.weight",
    "stages.0.blocks.0.mlp.expand.weight",
    "patch_embed.0.weight",
    "blocks.0.0.conv.conv1.1.weight",
)
"""Names that identify a HAT-Net: three of ours, then two of the released files."""


@dataclass(frozen=True)
class Weights:
    """One set of weights in a file."""

    key: str
    """Keys of the dicts and prefix of the names, joined by dots; empty at the top of the file."""

    tensors: dict[str, Tensor]
    """Tensors by the names of :class:`HATNet`."""

    dropped: list[str]
    """Names in the same dict that are not part of the model."""

    @property
    def rank(self) -> tuple[bool, list[int]]:
        """Sort key of preference: averages last, then by ``WRAPPERS``, then as in the file."""
        parts = self.key.split(".") if self.key else []
        order = [WRAPPERS.index(part) if part in WRAPPERS else len(WRAPPERS) for part in parts]
        return any(map(AVERAGE.search, parts)), order

    def is_at(self, key: str) -> bool:
        """Return whether the dotted ``key`` is part of this one."""
        return f".{key}." in f".{self.key}."


def choose_weights(content: Any, path: Path, key: str | None, names: Collection[str]) -> Weights:
    """Choose the weights of a HAT-Net in the content of a file; log the other sets.

    Args:
        content: tensors by name, or any nesting of dicts.
        path: where it was read, for messages.
        key: a key or prefix above the weights, such as ``model_ema``; None for the first by ``Weights.rank``.
        names: parameters of the model; a set that has them all is preferred.

    Raises:
        ValueError: if there is no dict of names to tensors, or nothing under ``key``.
    """
    found = sorted(find_weights(content), key=lambda weights: weights.rank)
    places = [weights.key or "its top" for weights in found]
    if key is not None:
        found = [weights for weights in found if weights.is_at(key)]
        if not found:
            raise ValueError(
                f"{path}: key must be the place of a HAT-Net ({abbreviate(places) or 'none found'}), got {key!r}"
            )
    found = [weights for weights in found if weights.tensors.keys() >= set(names)] or found
    if not found:
        return _largest(content, path)
    first, *others = found
    if others:
        others_at = abbreviate([repr(weights.key) for weights in others])
        logger.warning("%s: took the weights at %r; key= takes others: %s", path, first.key, others_at)
    return first


def find_weights(content: Any) -> Iterator[Weights]:
    """Yield every set of weights of a HAT-Net, in the order of the file."""
    for keys, tensors in _state_dicts(content):
        # One dict can contain several models, such as student and teacher, each under its own prefix. The prefixes are
        # keys of a dict, to keep the order of the file.
        prefixes = {
            name.removesuffix(marker): None
            for name in tensors
            for marker in MARKERS
            if name.endswith(marker) and (name == marker or name[: -len(marker)].endswith("."))
        }
        for prefix in prefixes:
            # "model." is also the start of "model.ema.": names under a longer prefix belong to that model
            inner = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
            own = {n: t for n, t in tensors.items() if n.startswith(prefix) and not (inner and n.startswith(inner))}
            state, unused = rename_released({name.removeprefix(prefix): t for name, t in own.items()})
            others = [name for name in tensors if name not in own]
            yield Weights(".".join([*keys, prefix.rstrip(".")]).strip("."), state, others + unused)


def _state_dicts(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield every dict of names to tensors, at any depth, with its keys; skip those of optimizers."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen = set()  # a dict can contain itself
    while waiting:
        keys, value = waiting.pop(0)
        if not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        inside = {name: v for name, v in value.items() if isinstance(name, str)}
        if tensors := {name: v for name, v in inside.items() if isinstance(v, Tensor)}:
            yield keys, tensors
        waiting += [((*keys, name), v) for name, v in inside.items() if not name.startswith(("optim", "exp_avg"))]


def _largest(content: Any, path: Path) -> Weights:
    """Take the largest dict of tensors, for the comparison with the model to describe."""
    largest = max((tensors for _, tensors in _state_dicts(content)), key=len, default=None)
    if largest is None:
        raise ValueError(f"{path} must contain a dict of parameter names to tensors, at any depth")
    return Weights("", largest, [])
