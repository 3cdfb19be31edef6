"""Compare the weights of a file with those of a model, by names and shapes, and say in few words what differs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hatnet_core.config import TRAINED, HATNetConfig
from hatnet_core.variants import list_models, model_arguments

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Dtypes that parameters may be stored in."""

BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked")
"""Endings of batch-norm statistics, listed after the parameters of a foreign model."""


def check_match(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, remedy: str, head: str) -> None:
    """Raise ValueError unless weights have exactly the names and shapes of a model.

    Args:
        own: state dict of the model.
        state: weights of the file.
        path: the file, for the message.
        remedy: advice where the file contains another of the paper's models, whose name replaces ``{}``.
        head: advice where only the number of classes differs.
    """
    found = list(differences(own, state))
    if not found:
        return
    held, expected = _variant(state), _variant(own)
    names = own.keys() | state.keys()
    same_body = all(name.startswith("head.") or _shape(own, name) == _shape(state, name) for name in names)
    if same_body and head_size(own) != head_size(state):
        found.append(head)
    elif held and held != expected:
        found.append(remedy.format(held))
    content, wanted = _described(state, held), _described(own, expected)
    relation = f"contains {content}; expected {wanted}" if content != wanted else f"does not fit {wanted}"
    raise ValueError(f"{path} {relation}: {'; '.join(filter(None, found))}")


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the names, shapes and kinds of ``state`` that are not those of ``own``, some of each."""
    if missing := sorted(own.keys() - state.keys()):
        yield f"missing {abbreviate(missing)}"
    if unknown := sorted(state.keys() - own.keys(), key=lambda name: (name.endswith(BUFFERS), name)):
        yield f"unknown {abbreviate(unknown)}"
    common = [name for name in state if name in own]
    if shapes := [
        f"{name} must be {tuple(own[name].shape)}, got {tuple(state[name].shape)}"
        for name in common
        if own[name].shape != state[name].shape
    ]:
        yield abbreviate(shapes)
    problems = {name: storage_problem(state[name]) for name in common}
    if kinds := [f"{name} must be dense, of a floating dtype, got {kind}" for name, kind in problems.items() if kind]:
        yield abbreviate(kinds)


def storage_problem(t: Tensor) -> str:
    """Describe a tensor that cannot be stored; empty for a plain one."""
    if type(t) not in (Tensor, nn.Parameter):
        return f"a {type(t).__name__}"
    if t.is_meta:
        return "one on the meta device"
    if t.dtype not in DTYPES or t.layout != torch.strided:
        return f"{t.layout} of {t.dtype}"
    return ""


def is_finite(t: Tensor) -> bool:
    """Return whether all values are finite, from both extremes: six times as fast as asking each value."""
    return all(extreme.isfinite().item() for extreme in torch.aminmax(t))


def variant_name(arguments: Mapping[str, Any]) -> str | None:
    """Name of the paper's model with these arguments, the first if some are not given; None if there is none.

    Arguments that can change without retraining, such as ``num_classes``, do not count.
    """
    for name in list_models(ablations=True):
        known = HATNetConfig(**model_arguments(name))
        if all(arguments[key] == known[key] for key in TRAINED if key in arguments):
            return name
    return None


def head_size(state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of the classifier in a state dict, 0 without one."""
    return (_shape(state, "head.weight", 2) or (0,))[0]


def stem_channels(state: Mapping[str, Tensor]) -> int:
    """Return the number of input channels of the stem in a state dict, 3 without one."""
    return (_shape(state, "stem.conv1.weight", 4) or (0, 3))[1]


def abbreviate(texts: list[str]) -> str:
    """Join the first three strings, cut to a readable length, and the number of the others."""
    shown = ", ".join(text if len(text) <= 200 else f"{text[:197]}..." for text in texts[:3])
    return f"{shown} and {len(texts) - 3} more" if len(texts) > 3 else shown


def _described(state: Mapping[str, Tensor], variant: str | None) -> str:
    if "stem.conv2.weight" not in state:
        return "no HAT-Net"
    classes = f" with {head_size(state)} classes" if head_size(state) else ""
    return (variant or "a HAT-Net of another configuration") + classes


def _variant(state: Mapping[str, Tensor]) -> str | None:
    """Name the paper's model that weights belong to; shapes do not show head_dim and activation."""
    counted = re.compile(r"stages\.([0-3])\.blocks\.(\d+)\.")
    blocks = {match.groups() for match in map(counted.match, state) if match}
    expand = [_shape(state, f"stages.{i}.blocks.0.mlp.expand.weight", 4) for i in range(4)]
    kernels = [_shape(state, f"stages.{i}.blocks.0.mlp.dwconv.weight", 4) for i in range(4)]
    if None in expand:
        return None
    hidden, dims = [shape[0] for shape in expand if shape], tuple(shape[1] for shape in expand if shape)
    tables = [f"stages.{i}.blocks.0.attn.relative_position_bias_table" in state for i in range(3)]
    arguments: dict[str, Any] = {
        "embed_dims": dims,
        "depths": tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(4)),
        "mlp_ratios": tuple(dim and h / dim for h, dim in zip(hidden, dims, strict=True)),
        "attention": tuple("window" if table else "hierarchical" for table in tables),
        "depthwise": None not in kernels,
    }
    if arguments["depthwise"]:
        arguments["kernel_sizes"] = tuple(shape[-1] for shape in kernels if shape)
    return variant_name(arguments)


def _shape(state: Mapping[str, Tensor], name: str, ndim: int | None = None) -> Sequence[int] | None:
    """Shape of a tensor; None if it is missing or has another number of dimensions."""
    t = state.get(name)
    return None if t is None or t.ndim != (ndim or t.ndim) else tuple(t.shape)
