"""A user's own DeepSpeed configuration: read, checked, and what it says of a :class:`TrainConfig`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatnet_train.records import read_json

FIELDS = {
    ("train_batch_size",): ("batch_size", int),
    ("gradient_accumulation_steps",): ("accumulation", int),
    ("gradient_clipping",): ("clip_grad", float),
    ("zero_optimization", "stage"): ("zero_stage", int),
    ("optimizer", "params", "lr"): ("lr", float),
    ("optimizer", "params", "weight_decay"): ("weight_decay", float),
}
"""Path in the file of a field of :class:`TrainConfig`, with the field and its type."""

AUTOCAST_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
"""Precisions other than fp32, which are also sections of the file, and what autocast calls them."""

SECTIONS = (("zero_optimization",), ("optimizer",), ("optimizer", "params"), ("torch_autocast",), ("bf16",), ("fp16",))
"""Sections that must be objects."""


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Read a user's DeepSpeed configuration, without values that are "auto" and sections that are empty then.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a JSON object, or has a section that is not an object, a schedule, another optimizer
            than AdamW, or a value that :func:`fields_of` refuses.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no DeepSpeed configuration at {path}: expected a JSON file")
    content = read_json(path, dict[str, Any])
    content = _without_auto(content)
    for section in SECTIONS:
        value = value_at(content, section)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{path}: {'.'.join(section)} must be an object, got {value!r}")
    for name in ("torch_autocast", *AUTOCAST_DTYPES):
        value = value_at(content, (name, "enabled"))
        if value not in (None, True, False):
            raise ValueError(f"{path}: {name}.enabled must be true or false, got {value!r}")
    if "scheduler" in content:
        raise ValueError(f"{path} has a scheduler, but the recipe has one: set --warmup-epochs, --lr and --min-lr")
    kind = value_at(content, ("optimizer", "type"))
    if kind not in (None, "Adam", "AdamW") or value_at(content, ("optimizer", "params", "adam_w_mode")) is False:
        raise ValueError(f"{path}: the optimizer must be AdamW (Sec. 4.1), got {json.dumps(content['optimizer'])}")
    for name in ("offload_optimizer", "offload_param"):
        if value_at(content, ("zero_optimization", name, "device")) not in (None, "none"):
            raise ValueError(
                f"{path}: zero_optimization.{name} must be omitted: the states of HAT-Net fit on its devices, and "
                "checkpoints do not look for them elsewhere"
            )
    try:
        fields_of(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return content


def fields_of(user: Mapping[str, Any]) -> dict[str, Any]:
    """Values of :class:`TrainConfig` that a user's DeepSpeed configuration gives.

    Raises:
        ValueError: if one has another type than expected, or two precisions are enabled.
    """
    fields: dict[str, Any] = {}
    for path, (name, kind) in FIELDS.items():
        value = value_at(user, path)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise ValueError(f"{'.'.join(path)} must be of type {kind.__name__}, got {value!r}")
        fields[name] = kind(value)
    if "lr" in fields:
        fields["lr_batch_size"] = 0  # the file gives the rate of its own batch
    precisions = [name for name in AUTOCAST_DTYPES if enabled(user, name)]
    if enabled(user, "torch_autocast"):
        dtype = user["torch_autocast"].get("dtype", "bfloat16")
        named = [name for name, known in AUTOCAST_DTYPES.items() if known == dtype]
        if not named:
            raise ValueError(
                f"torch_autocast.dtype must be one of {', '.join(AUTOCAST_DTYPES.values())}, got {dtype!r}"
            )
        precisions += named
    if len(precisions) > 1:
        raise ValueError(f"one precision can be enabled, got {', '.join(precisions)}")
    if precisions:
        fields["precision"] = precisions[0]
    return fields


def key_of(field: str) -> str:
    """Key of a field of :class:`TrainConfig` in the file: ``train_batch_size`` for ``batch_size``."""
    return next((".".join(path) for path, (name, _) in FIELDS.items() if name == field), field)


def enabled(user: Mapping[str, Any], section: str) -> bool:
    """Return whether a section of the file is enabled."""
    return bool(value_at(user, (section, "enabled")))


def value_at(section: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """Value at a path of names; None if missing."""
    value: Any = section
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in section.items():
        if isinstance(value, dict):
            inner = _without_auto(value)
            if inner or not value:
                kept[name] = inner
        elif value != "auto":
            kept[name] = value
    return kept
