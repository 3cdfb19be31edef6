"""Read a checkpoint of any origin, opening its file once."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hatnet_core.checkpoint.foreign import Weights, choose_weights
from hatnet_core.checkpoint.matching import abbreviate
from hatnet_core.checkpoint.zero import read_zero
from hatnet_core.io import json_object
from hatnet_core.variants import MIN_SIZE

WEIGHTS = "model.safetensors"
"""File of the weights in a folder: a run of hatnet-train, one of its checkpoints, or a model of the hub."""

SIZE = 224
"""Side in pixels of the images that the paper's models are trained with (Sec. 4.1)."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint, read once.

    :func:`load_checkpoint` and :func:`load_model` take it in place of a path, for callers that also need its metadata
    or its weights.
    """

    path: Path
    """File, or folder of DeepSpeed."""

    content: Any
    """Tensors by name, or the nested dicts around them."""

    metadata: dict[str, Any]
    """Result of :func:`read_metadata`; empty if the file does not describe its model."""

    def weights(self, key: str | None = None, names: Collection[str] = ()) -> Weights:
        """Find the weights of a HAT-Net; see :func:`hatnet_core.checkpoint.foreign.choose_weights`."""
        return choose_weights(self.content, self.path, key, names)


def read_checkpoint(path: str | Path | Checkpoint) -> Checkpoint:
    """Read the content of a checkpoint; one that was read already is returned.

    Args:
        path: as for :func:`load_checkpoint`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file cannot be read, or contains more than plain tensors and containers.
        ImportError: if the package that reads the file is not installed.
    """
    if isinstance(path, Checkpoint):
        return path
    path = _weights_file(path)
    if path.is_dir():
        return Checkpoint(path, read_zero(path), {})
    if path.suffix != ".safetensors":
        return Checkpoint(path, _read_torch(_existing(path)), {})
    return Checkpoint(path, *_read_safetensors(_existing(path)))


def read_state(
    path: str | Path, key: str | None = None, names: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Read the weights in a checkpoint, and the names that are dropped; see :meth:`Checkpoint.weights`."""
    weights = read_checkpoint(path).weights(key, names)
    return weights.tensors, list(weights.dropped)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` stored with the weights, without loading them.

    Args:
        path: the file, or a folder as for :func:`load_checkpoint`.

    Returns:
        ``version``, ``variant`` (None if the model is not one of the paper's), ``config`` (arguments of
        :class:`HATNet`), and what was passed as ``metadata``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a safetensors file written by :func:`save_checkpoint`.
        ImportError: if safetensors is not installed.
    """
    path = _weights_file(path)
    if path.is_dir():
        raise ValueError(f"{path} contains no {WEIGHTS}, which describes its model")
    _, record = _read_safetensors(_existing(path), header_only=True)
    if not record:
        raise ValueError(f"{path} has no HAT-Net configuration: where a model is loaded, name it with variant=NAME")
    return record


def find_metadata(path: str | Path) -> dict[str, Any]:
    """Read metadata as :func:`read_metadata`; empty if the checkpoint does not describe its model.

    Raises:
        FileNotFoundError: if a safetensors file does not exist.
        ImportError: if the file is safetensors and safetensors is not installed.
    """
    try:
        return read_metadata(path) if _weights_file(path).suffix == ".safetensors" else {}
    except ValueError:
        return {}


def trained_size(path: str | Path | None, high: int) -> tuple[int, int]:
    """Height and width in pixels of the images that a checkpoint was trained with, 224 if it does not record them.

    Args:
        path: as for :func:`load_checkpoint`; None for a model without a checkpoint.
        high: the largest side to expect.

    Raises:
        ValueError: if the recorded size is not a whole number of pixels up to ``high``.
        FileNotFoundError: if a safetensors file does not exist.
    """
    side = SIZE if path is None else find_metadata(path).get("image_size", SIZE)
    if type(side) is not int or not MIN_SIZE <= side <= high:
        raise ValueError(f"{path}: image_size must be a whole number from {MIN_SIZE} to {high}, got {side!r}")
    return side, side


def _read_safetensors(path: Path, *, header_only: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, none with ``header_only``, and the record of :func:`save_checkpoint`, empty without one."""
    import_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors, header = {} if header_only else file.get_tensors(), file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from None
    try:
        record = json_object(header.get("hatnet", "null"), path)
        json_object(record.get("config"), path)
    except ValueError:  # of another program
        record = {}
    return tensors, record


def _read_torch(path: Path) -> Any:
    """Read a file of ``torch.save``: tensors and plain containers only, so that no code of the file runs."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # trainers store their arguments, too
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file makes the unpickler raise anything from KeyError to struct.error
        reason = _refused(path)
    # Raised here, not inside "except": torch's page of advice to switch the protection off would be attached.
    raise ValueError(f"{path} is not a checkpoint of plain tensors: {reason}")


def _refused(path: Path) -> str:
    """Explain why ``torch.load`` refused a file."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above, the file may contain anything
        foreign = []
    if foreign:
        return f"it also contains {abbreviate(foreign)}, and unpickling such objects could run code of the file"
    return "it is damaged or has another format"


def import_safetensors() -> Any:
    """Import ``safetensors.torch``; the ImportError names the extra to install."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors files need the safetensors package: pip install 'hatnet-core[safetensors]'"
        ) from error
    return safetensors.torch


def _weights_file(path: str | Path) -> Path:
    """File of the weights if ``path`` is a folder that has one, else ``path``."""
    path = Path(path)
    return path / WEIGHTS if (path / WEIGHTS).is_file() else path


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: the file or folder must exist")
    return path
