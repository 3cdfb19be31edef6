"""The weights of a HAT-Net in files that others write, recognised by the names of the parameters.

:func:`find_weights` looks through every dict of a file for the names of :class:`HATNet` or of the released files,
behind any prefix: those of ``torch.compile`` and data parallelism, of a Lightning module, of a detector's backbone, of
a dict for the moving average. :func:`read_content` unpickles nothing beyond plain tensors (``weights_only=True``).
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hatnet_core.released_names import rename_released

logger = logging.getLogger("hatnet_core")

WRAPPERS = ("state_dict", "model", "module")
"""Keys of weights that are preferred where a file holds several sets; ``module`` is DeepSpeed's."""

AVERAGE = re.compile(r"(^|_)(ema|average|averaged|teacher)($|_)")
"""Keys of moving averages, which are taken last."""

MARKERS = (
    "stem.conv1.weight",
    "stem.conv2.weight",
    "stages.0.blocks.0.mlp.expand.weight",
    "patch_embed.0.weight",
    "blocks.0.0.conv.conv1.1.weight",
)
"""Names that show a HAT-Net: of ours, then of the released files."""


@dataclass(frozen=True)
class Weights:
    """One set of weights in a file."""

    key: str
    """Its place: the keys of the dicts and the prefix of the names, joined by dots; empty at the top."""

    tensors: dict[str, Tensor]
    """The weights, under the names of :class:`HATNet`."""

    dropped: list[str]
    """Names in the same dict that are not part of the model."""

    @property
    def rank(self) -> tuple[bool, list[int]]:
        """Order of preference: no average, then ``WRAPPERS``; a sort keeps the order of the file."""
        parts = self.key.split(".") if self.key else []
        order = [WRAPPERS.index(part) if part in WRAPPERS else len(WRAPPERS) for part in parts]
        return any(map(AVERAGE.search, parts)), order

    def is_at(self, key: str) -> bool:
        """The parts of ``key`` are in this place, one after the other."""
        return f".{key}." in f".{self.key}."


def choose_weights(content: Any, path: Path, key: str | None, names: Collection[str]) -> Weights:
    """Choose the weights of a HAT-Net in the content of a file; log the other sets.

    Args:
        content: what :func:`read_content` returns.
        path: where it was read, for messages.
        key: a key or prefix above the weights, such as ``model_ema``; None for the first by ``Weights.rank``.
        names: parameters that have to be there, if some set has them all.

    Raises:
        ValueError: if there is no dict of names to tensors, or nothing under ``key``.
    """
    found = sorted(find_weights(content), key=lambda weights: weights.rank)
    places = [weights.key or "its top" for weights in found]
    if key is not None:
        found = [weights for weights in found if weights.is_at(key)]
        if not found:
            raise ValueError(
                f"{path}: key must be the place of a HAT-Net ({some(places) or 'none found'}), got {key!r}"
            )
    found = [weights for weights in found if weights.tensors.keys() >= set(names)] or found
    if not found:
        return _largest(content, path)
    first, *others = found
    if others:
        others_at = some([repr(weights.key) for weights in others])
        logger.warning("%s: took the weights at %r; key= takes others: %s", path, first.key, others_at)
    return first


def find_weights(content: Any) -> Iterator[Weights]:
    """Find every set of weights of a HAT-Net, in the order of the file."""
    for keys, tensors in _state_dicts(content):
        prefixes = {
            name.removesuffix(marker): None
            for name in tensors
            for marker in MARKERS
            if name.endswith(marker) and (name == marker or name[: -len(marker)].endswith("."))
        }
        for prefix in prefixes:
            inner = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
            own = {n: t for n, t in tensors.items() if n.startswith(prefix) and not (inner and n.startswith(inner))}
            state, unused = rename_released({name.removeprefix(prefix): t for name, t in own.items()})
            others = [name for name in tensors if name not in own]
            yield Weights(".".join([*keys, prefix.rstrip(".")]).strip("."), state, others + unused)


def _state_dicts(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Every dict of names to tensors, at any depth, with the keys that lead there; none of an optimizer's."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen = set()
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
    """The largest dict of tensors, which the check against the model then describes."""
    largest = max((tensors for _, tensors in _state_dicts(content)), key=len, default=None)
    if largest is None:
        raise ValueError(f"{path} must hold a dict of parameter names to tensors, at any depth")
    return Weights("", largest, [])


def read_content(path: Path) -> Any:
    """Read a file of ``torch.save`` or safetensors, tensors and plain containers only.

    Raises:
        ValueError: if it is damaged, of another format or holds other objects.
        ImportError: if the file is safetensors and safetensors is not installed.
    """
    if path.suffix == ".safetensors":
        safetensors_torch = import_safetensors()
        from safetensors import SafetensorError

        try:
            return safetensors_torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # trainers store their arguments, too
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file makes the unpickler raise anything from KeyError to struct.error
        reason = _refused(path)
    raise ValueError(f"{path} is not a checkpoint of plain tensors: {reason}")  # without torch's page about unpickling


def _refused(path: Path) -> str:
    """Why ``torch.load`` would not read a file, without its advice to switch the protection off."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above: the file may hold anything
        foreign = []
    if foreign:
        return f"it also holds {some(foreign)}, and to unpickle such objects could run code of the file"
    return "it is damaged or of another format"


def import_safetensors() -> Any:
    """``safetensors.torch``; ImportError with the command that installs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors files need the safetensors package: pip install 'hatnet-core[safetensors]'"
        ) from error
    return safetensors.torch


def some(texts: list[str]) -> str:
    """The first three of ``texts``, cut to a readable length, and the number of the others."""
    shown = ", ".join(text if len(text) <= 200 else f"{text[:197]}..." for text in texts[:3])
    return f"{shown} and {len(texts) - 3} more" if len(texts) > 3 else shown
