"""Checkpoints of MMEngine that hold nothing but tensors and plain values, so that they can be loaded safely.

MMEngine pickles objects of its own into every checkpoint: the histories of the logged scalars, and what NumPy made.
``torch.load`` refuses such files unless told to run whatever code a file asks for, and MMEngine 0.10 does not tell
it; a run could neither be resumed nor tested. This hook writes the same values as lists and numbers and makes them
what they were when they come back. It also looks whether the weights fit, which MMEngine would only log.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor

from hatnet_core.checkpoint.zero import MODEL_STATES

HISTORY = "hatnet_dense.HistoryBuffer"
"""Key that marks a history of scalars among the plain values."""

RESUMED = ("optimizer", "param_schedulers", "message_hub")
"""What a run that goes on needs beside weights, epoch and iteration."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor)


@HOOKS.register_module()
class PlainCheckpointHook(Hook):  # type: ignore[misc]  # mmengine ships no types
    """Keeps checkpoints free of pickled objects, and refuses those of another model.

    A checkpoint that is tested or resumed has to hold every parameter of the model, with its shape, and no other.
    One that training starts from (``load_from``) may differ in the heads, as for other classes, which is logged,
    but has to hold the backbone.
    """

    priority = "VERY_LOW"  # sees what the other hooks put in

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Turn what is about to be written into plain values, in place."""
        for key, value in checkpoint.items():
            checkpoint[key] = plain(value, key)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Turn the histories back, in place, and compare the weights with the model.

        Raises:
            ValueError: if the weights do not fit, naming some that do not.
        """
        if "message_hub" in checkpoint:
            scalars = checkpoint["message_hub"]["log_scalars"]
            checkpoint["message_hub"]["log_scalars"] = {key: _history(value) for key, value in scalars.items()}
        if "state_dict" not in checkpoint and "message_hub" in checkpoint:
            return  # DeepSpeed has taken the weights, strictly
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        starts_training = (
            not isinstance(runner._train_loop, Mapping | None) and not runner._resume
        )  # else still a config
        check_weights(model.state_dict(), checkpoint.get("state_dict", checkpoint), strict=not starts_training)


def plain(value: Any, where: str) -> Any:
    """``value`` as tensors, numbers, strings, lists, tuples and dicts; what cannot be is named in a warning.

    Args:
        value: anything.
        where: the path of keys that leads to it, for the warning.
    """
    if isinstance(value, HistoryBuffer):
        history, counts = value.data
        return {HISTORY: [history.tolist(), counts.tolist(), value.max_length]}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, OrderedDict | Counter):  # torch loads these two as they are
        copied: Any = type(value)({key: plain(item, f"{where}.{key}") for key, item in value.items()})
        if hasattr(value, "_metadata"):  # versions of the modules, in a state dict
            copied._metadata = getattr(value, "_metadata")  # noqa: B009  # a dict with an attribute, torch's
        return copied
    if isinstance(value, Mapping):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    print_log(
        f"checkpoint: {where} is {type(value).__name__}, which no safe loader reads", "current", level=logging.WARNING
    )
    return value


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of MMEngine, or a bare state dict under ``state_dict``; nothing but plain values is unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is an address or a folder, or cannot be read, or holds what no checkpoint does.
    """
    if "://" in str(path):
        raise ValueError(f"{path} is an address: expected a file, downloaded beforehand")
    path = Path(path)
    if path.is_dir():
        deepspeed = any(path.rglob(MODEL_STATES))
        raise ValueError(
            f"{path} is a folder of DeepSpeed: expected a file, such as model.pth of its run"
            if deepspeed
            else f"{path} is a folder: expected a file"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: expected an existing file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the file may hold anything
        raise ValueError(
            f"cannot read {path}: expected a checkpoint of tensors and plain values, as PlainCheckpointHook writes it"
        ) from error
    if isinstance(content, Mapping) and "state_dict" not in content:
        content = {"state_dict": content}
    defect = _defect(content)
    if defect is not None:
        raise ValueError(f"cannot read {path}: expected a checkpoint of tensors and plain values, got {defect}")
    return dict(content)


def read_training_run(path: str | Path) -> dict[str, Any]:
    """A checkpoint that training can go on from; raises as :func:`read_checkpoint`, and if it holds weights only."""
    content = read_checkpoint(path)
    meta = content.get("meta", {})
    if not {"epoch", "iter"} <= set(meta) or not set(RESUMED) <= set(content):
        raise ValueError(
            f"{path} holds weights only: expected a checkpoint of a training run; load_from={path} starts from weights"
        )
    return content


def _defect(content: Any) -> str | None:
    """What is no part of a checkpoint, or None."""
    if not isinstance(content, Mapping):
        return type(content).__name__
    weights, meta = content["state_dict"], content.get("meta", {})
    if not isinstance(weights, Mapping):
        return f"state_dict of type {type(weights).__name__}"
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            return f"{type(value).__name__} under the name {name!r} in state_dict"
    for key, value in (("meta", meta), ("meta.dataset_meta", (meta or {}).get("dataset_meta", {}))):
        if not isinstance(value, Mapping):
            return f"{key} of type {type(value).__name__}"
    return None


def check_weights(own: Mapping[str, Tensor], given: Mapping[str, Any], strict: bool) -> None:
    """Compare the weights of a file with those of the model.

    Args:
        own: the state dict of the model.
        given: that of the file; ``module.`` in front of its names does not matter.
        strict: whether every difference is an error, or only one in the backbone.

    Raises:
        ValueError: naming the first differences.
    """
    given = {name.removeprefix("module."): value for name, value in given.items()}
    differences = [f"{name} is missing" for name in own if name not in given]
    differences += [f"{name} is unknown" for name in given if name not in own]
    differences += [
        f"{name} is {tuple(given[name].shape)} and should be {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    fatal = [text for text in differences if strict or text.startswith("backbone.")]
    if fatal:
        raise ValueError(f"the checkpoint does not fit the model of the config: {_some(fatal)}")
    if differences:
        print_log(f"not taken from the checkpoint: {_some(differences)}", "current", level=logging.WARNING)


def _history(value: Any) -> Any:
    if not isinstance(value, Mapping) or HISTORY not in value:
        return value
    history, counts, max_length = value[HISTORY]
    return HistoryBuffer(history, counts, max_length)


def _some(texts: list[str]) -> str:
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")
