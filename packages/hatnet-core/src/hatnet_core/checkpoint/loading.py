"""Load weights into a model, or build the model that a checkpoint describes: strictly, and unchanged on any error."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hatnet_core.checkpoint.matching import abbreviate, check_match, head_size, is_finite, stem_channels
from hatnet_core.checkpoint.reading import Checkpoint, read_checkpoint
from hatnet_core.model import HATNet, unwrap
from hatnet_core.variants import model_arguments

logger = logging.getLogger("hatnet_core")

SHAPELESS = ("head_dim", "activation")
"""Arguments that weights are trained for, although no shape shows them."""


def load_checkpoint(
    model: nn.Module, path: str | Path | Checkpoint, drop_head: bool = False, key: str | None = None
) -> list[str]:
    """Load weights into ``model`` from one of our safetensors files, a released ``.pth`` or a trainer's checkpoint.

    The weights are found by their names, in any dict of the file and under any prefix. Loading is strict: the file
    must contain every parameter of the model, with its shape and finite, and no others. Two things are dropped: the
    unused ``proj_norm`` of the released files, and what is outside the prefix, such as a detector's neck.
    Weights for three input channels are adapted to a model of another number as timm does: summed for one channel,
    else repeated and scaled. On any error the model is unchanged.

    If the file contains several sets of weights, such as ``model`` and ``model_ema``, one with all names of the model
    is taken. Among several of those, moving averages come last, then the order is ``state_dict``, ``model``,
    ``module``, then that of the file. The choice is logged.

    Args:
        model: the model, or one wrapped as :func:`hatnet_core.model.unwrap` undoes; keeps its device, dtype, G1 and
            G2.
        path: ``*.safetensors``; any other name for a file of ``torch.save``; a folder with a ``model.safetensors``,
            such as a run of hatnet-train; the folder of a DeepSpeed checkpoint of any ZeRO stage (see
            :mod:`hatnet_core.checkpoint.zero`); or a :class:`hatnet_core.checkpoint.Checkpoint`.
        drop_head: keep the classifier of the model and ignore that of the file, of whatever size.
        key: the key of a dict, or the prefix, that the weights are under, such as ``model_ema``.

    Returns:
        The names in the file that were dropped on purpose, empty for our own files; also logged.

    Raises:
        FileNotFoundError: if the file does not exist.
        TypeError: if ``model`` is not a :class:`HATNet`.
        ValueError: if the file cannot be read, contains another model or number of classes, or values that are not
            finite.
        ImportError: if the file is safetensors and safetensors is not installed.

    Example:
        >>> from hatnet_core import create_model, load_checkpoint
        >>> model = create_model("hatnet_small")
        >>> load_checkpoint(model, "HAT-Net_Small.pth")  # doctest: +SKIP
    """
    model = unwrap(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"cannot load {path} into a model on the meta device; give it storage first, by to_empty()")
    checkpoint = read_checkpoint(path)
    own = {name: t for name, t in model.state_dict().items() if not (drop_head and name.startswith("head."))}
    weights = checkpoint.weights(key, own.keys())
    heads = [name for name in weights.tensors if drop_head and name.startswith("head.")]
    state = {name: t for name, t in weights.tensors.items() if name not in heads}
    state = _adapt_in_chans(state, model.in_chans, checkpoint.path)
    head = "" if drop_head else "drop_head=True keeps the head of the model"
    check_match(own, state, checkpoint.path, "create_model('{}') builds that", head)
    _assign(model, state, checkpoint)
    dropped = [*weights.dropped, *heads]
    _log_dropped(checkpoint.path, dropped)
    return dropped


def load_model(path: str | Path | Checkpoint, variant: str | None = None, key: str | None = None) -> HATNet:
    """Build the model of a checkpoint, with its weights, in training mode.

    Args:
        path: as for :func:`load_checkpoint`.
        variant: name of the model, for files without a configuration; the number of classes and of input channels
            is that of the file.
        key: as for :func:`load_checkpoint`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file does not name its model, its configuration does not match its weights, or as for
            :func:`load_checkpoint`.
        ImportError: if the file is safetensors and safetensors is not installed.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.weights(key)
    if variant is not None:
        state = weights.tensors
        config = {**model_arguments(variant), "num_classes": head_size(state), "in_chans": stem_channels(state)}
    elif checkpoint.metadata:
        config = checkpoint.metadata["config"]
    else:
        raise ValueError(f"{checkpoint.path} does not say which model it contains: name it with variant=NAME")
    model = build_loaded(HATNet, config, checkpoint.path, checkpoint, weights.tensors)
    _log_dropped(checkpoint.path, weights.dropped)
    return model


def build_loaded(
    kind: type[HATNet],
    config: Mapping[str, Any],
    origin: str | Path,
    checkpoint: Checkpoint,
    state: dict[str, Tensor],
    device: str | torch.device | None = None,
) -> HATNet:
    """Build a model from the arguments ``config``, read from ``origin``, with weights from ``checkpoint``.

    Everything is checked before anything of the model's size is allocated.
    """
    depths = config.get("depths")
    # Modules cost memory even without storage: a forged number of blocks must not fill it.
    if isinstance(depths, list) and all(type(depth) is int for depth in depths) and sum(depths) > len(state):
        raise ValueError(f"{origin}: depths must be at most {len(state)} blocks, one tensor each, got {sum(depths)}")
    try:
        with torch.device("meta"):  # no storage and no random numbers for weights that are replaced
            model = kind(**config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the last two by torch, about the size
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{origin} does not contain a valid HAT-Net configuration: {reason}") from error
    state = _adapt_in_chans(state, model.in_chans, checkpoint.path)
    check_match(model.state_dict(), state, checkpoint.path, "name it with variant={}", "")
    model.to_empty(device=torch.get_default_device() if device is None else device)
    _assign(model, state, checkpoint)
    return model


def _assign(model: HATNet, state: dict[str, Tensor], checkpoint: Checkpoint) -> None:
    """Check values and settings of weights that match by name and shape, then copy them."""
    stored = checkpoint.metadata.get("config", {})
    for name in SHAPELESS:
        if stored.get(name, model.config[name]) != model.config[name]:
            raise ValueError(
                f"{checkpoint.path}: {name} must be {model.config[name]} for this model, got {stored[name]}"
            )
    own = model.state_dict()
    state = {name: t.to(own[name].dtype) for name, t in state.items()}
    if broken := [name for name, t in state.items() if not is_finite(t)]:
        raise ValueError(
            f"{checkpoint.path} contains values that are not finite as {own[broken[0]].dtype}, in {abbreviate(broken)}"
        )
    model.load_state_dict(state, strict=False)  # check_match was strict; with drop_head, the head is missing


def _adapt_in_chans(state: dict[str, Tensor], in_chans: int, path: Path) -> dict[str, Tensor]:
    """Turn a stem for three channels into one for ``in_chans``, as timm's adapt_input_conv does."""
    name = "stem.conv1.weight"
    weight = state.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or in_chans == 3:
        return state
    if in_chans == 1:
        adapted = weight.sum(1, keepdim=True)
    else:
        repeated = weight.repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans]
        adapted = repeated * (3 / in_chans)  # keeps the scale of the sum over channels
    logger.warning("%s: adapted %s from 3 to %d input channels", path, name, in_chans)
    return {**state, name: adapted}


def _log_dropped(path: Path, dropped: list[str]) -> None:
    if dropped:
        parameters = "parameter" if len(dropped) == 1 else "parameters"
        logger.warning("%s: dropped %d %s: %s", path, len(dropped), parameters, abbreviate(dropped))
