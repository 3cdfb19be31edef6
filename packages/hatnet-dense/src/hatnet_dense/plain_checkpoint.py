"""Checkpoints of MMEngine without pickled objects, so that ``torch.load`` reads them safely.

MMEngine 0.10 pickles histories of logged scalars and NumPy values into every checkpoint, and cannot load them with
PyTorch 2.6 and later, which by default refuses pickled code. :class:`PlainCheckpointHook` writes the same values as
lists and numbers, and restores them on loading. It also checks that the weights fit, which MMEngine only logs.
"""

from __future__ import annotations

import copy
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
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import HOOKS
from torch import Tensor

from hatnet_core.checkpoint.zero import MODEL_STATES

HISTORY = "hatnet_dense.HistoryBuffer"
"""Key that marks a history of scalars among plain values."""

RESUMED = ("optimizer", "param_schedulers", "message_hub")
"""Keys that a resumed run needs besides weights, epoch and iteration."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor)
"""Types that ``torch.load`` reads safely."""


@HOOKS.register_module()
class PlainCheckpointHook(Hook):  # type: ignore[misc]  # mmengine ships no types
    """Keep checkpoints free of pickled objects, and refuse those of another model.

    A checkpoint that is tested or resumed must have exactly the parameters of the model. One that training starts from
    (``load_from``) must have the backbone; differences in the heads, as for other classes, are logged.
    """

    priority = "VERY_LOW"  # after hooks that add values

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replace the values of a checkpoint by plain ones, in place."""
        for key, value in checkpoint.items():
            checkpoint[key] = plain(value, key)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the histories of a checkpoint, in place, and compare its weights with the model.

        Raises:
            ValueError: naming the first weights that do not fit.
        """
        if "message_hub" in checkpoint:
            scalars = checkpoint["message_hub"]["log_scalars"]
            checkpoint["message_hub"]["log_scalars"] = {key: _history(value) for key, value in scalars.items()}
        if "state_dict" not in checkpoint and "message_hub" in checkpoint:
            return  # DeepSpeed has loaded the weights, strictly
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        # the runner builds the optimizer before it loads weights to train, and not at all to test
        trains = isinstance(runner.optim_wrapper, BaseOptimWrapper)
        strict = not trains or bool(runner.cfg.get("resume"))
        check_weights(model.state_dict(), checkpoint.get("state_dict", checkpoint), strict=strict)


def plain(value: Any, where: str) -> Any:
    """Convert a value to tensors, numbers, strings, lists, tuples and dicts.

    Args:
        value: anything; an object without such a form is returned unchanged, with a warning.
        where: the path of keys to the value, for the warning.
    """
    if isinstance(value, HistoryBuffer):
        history, counts = value.data
        return {HISTORY: [history.tolist(), counts.tolist(), value.max_length]}
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, OrderedDict | Counter):  # types that torch loads, too
        copied = copy.copy(value)  # with the attributes that torch adds to a state dict
        for key, item in value.items():
            copied[key] = plain(item, f"{where}.{key}")
        return copied
    if isinstance(value, Mapping):
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    print_log(
        f"checkpoint: {where} is {type(value).__name__}, which safe loaders refuse", "current", level=logging.WARNING
    )
    return value


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of MMEngine safely; a bare state dict is returned under ``state_dict``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is a URL or a folder, cannot be read, or is not a checkpoint.
    """
    if "://" in str(path):
        raise ValueError(f"the checkpoint must be a local file, got {path}")
    path = Path(path)
    if path.is_dir():
        hint = ", such as model.pth of this run of DeepSpeed" if any(path.rglob(MODEL_STATES)) else ""
        raise ValueError(f"the checkpoint must be a file{hint}, got the folder {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the checkpoint does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the file may contain anything
        raise ValueError(
            f"{path}: not a checkpoint of tensors and plain values, as PlainCheckpointHook writes it"
        ) from error
    if isinstance(content, Mapping) and "state_dict" not in content:
        content = {"state_dict": content}
    defect = _defect(content)
    if defect is not None:
        raise ValueError(f"{path}: not a checkpoint of tensors and plain values, got {defect}")
    return dict(content)


def read_training_run(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to resume from; raises as :func:`read_checkpoint`, and if it has weights only."""
    content = read_checkpoint(path)
    meta = content.get("meta", {})
    if not {"epoch", "iter"} <= set(meta) or not set(RESUMED) <= set(content):
        raise ValueError(
            f"{path}: a checkpoint to resume must be of a training run, got weights only; load_from={path} "
            "starts a new run from them"
        )
    return content


def _defect(content: Any) -> str | None:
    """Describe the first value that a checkpoint must not have, None if there is none."""
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
        own: state dict of the model.
        given: state dict of the file; a prefix ``module.`` is ignored.
        strict: refuse every difference, not only those in the backbone.

    Raises:
        ValueError: naming the first differences.
    """
    given = {name.removeprefix("module."): value for name, value in given.items()}
    differences = [f"{name} is missing" for name in own if name not in given]
    differences += [f"{name} is unknown" for name in given if name not in own]
    differences += [
        f"{name} must be {tuple(own[name].shape)}, got {tuple(given[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    fatal = [text for text in differences if strict or text.startswith("backbone.")]
    if fatal:
        raise ValueError(f"the checkpoint does not fit the model of the config: {_some(fatal)}")
    if differences:
        print_log(f"not loaded from the checkpoint: {_some(differences)}", "current", level=logging.WARNING)


def _history(value: Any) -> Any:
    if not isinstance(value, Mapping) or HISTORY not in value:
        return value
    history, counts, max_length = value[HISTORY]
    return HistoryBuffer(history, counts, max_length)


def _some(texts: list[str]) -> str:
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")
