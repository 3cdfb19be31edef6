"""Save a model and its configuration as a safetensors file that is certain to load again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hatnet_core.__about__ import __version__
from hatnet_core.attention import Attention, HierarchicalAttention, WindowAttention
from hatnet_core.checkpoint.matching import abbreviate, differences, is_finite, storage_problem, variant_name
from hatnet_core.checkpoint.reading import import_safetensors
from hatnet_core.config import HATNetConfig
from hatnet_core.io import atomic_write
from hatnet_core.layers import Mlp, Stem
from hatnet_core.model import HATNet, unwrap

REMEDIES = {
    ".base_layer.": "call merge_and_unload() of the PEFT model",
    "parametrizations": "call torch.nn.utils.parametrize.remove_parametrizations()",
    "_orig_mod": "compile its parts in place, by module.compile()",
    "_orig": "call torch.nn.utils.prune.remove()",
    "DTensor": "gather it, by get_model_state_dict(full_state_dict=True) into a model that is not sharded",
    "meta device": "give it storage, by to_empty(), and load weights",
    "not finite": "save a model from before its training diverged",
    "grid_size": "call set_grid()",
    "head.": "call reset_classifier(num_classes)",
}
"""Ways to make a model savable, by a word in its difference from its configuration; the first match counts."""


def save_checkpoint(model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the weights and configuration of a model to a safetensors file, atomically.

    The model is compared with its configuration first, so that what is written also loads.

    Args:
        model: the model, or one wrapped as :func:`hatnet_core.model.unwrap` undoes. Parameters keep their dtype and
            are copied from any device. A ``head`` replaced by another ``nn.Linear`` or by ``nn.Identity`` is saved
            with its own number of classes.
        path: the file, ``*.safetensors``, in an existing folder.
        metadata: further values to store with the configuration, anything JSON can hold.

    Raises:
        ImportError: if safetensors is not installed.
        FileNotFoundError: if the folder does not exist.
        TypeError: if ``model`` is not a :class:`HATNet`.
        ValueError: if ``path`` has another ending, ``metadata`` names ``version``, ``variant`` or ``config``, or the
            file could not be loaded again: stages were pruned, layers were replaced, wrapped or sharded, or a value is
            not finite. The message names the difference and the remedy.
    """
    safetensors_torch = import_safetensors()
    path, model = Path(path), unwrap(model)
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot save {path}: the name must end in .safetensors")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save {path}: folder {path.parent} does not exist")
    try:
        config = saved_config(model)
    except ValueError as error:
        raise ValueError(f"cannot save {path}: {error}") from None
    record = {"version": __version__, "variant": variant_name(config), "config": dict(config)}
    if taken := record.keys() & (metadata or {}).keys():
        raise ValueError(f"metadata must not contain {', '.join(sorted(taken))}, which describe the model itself")
    header = {"format": "pt", "hatnet": json.dumps(record | dict(metadata or {}))}
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    with atomic_write(path) as part:
        safetensors_torch.save_file(tensors, part, header)


def saved_config(model: HATNet) -> HATNetConfig:
    """Return the configuration that rebuilds a model in its present state, including its head.

    Raises:
        ValueError: if the configuration builds a different model; names the first differences and the remedy.
    """
    config = model.config
    if len(model.stages) != len(config.depths):
        raise ValueError(f"the model was pruned to {len(model.stages)} of its stages; save it before pruning")
    if type(model.head) in (nn.Linear, nn.Identity):
        config = config.replace(num_classes=getattr(model.head, "out_features", 0))
    with torch.device("meta"):
        described = HATNet(**config)
    if found := "; ".join(_changes(described, model)):
        remedy = next(
            (way for word, way in REMEDIES.items() if word in found), "torch.save() its state_dict() instead"
        )
        raise ValueError(f"the model differs from its configuration, {found}: {remedy}")
    return config


def _changes(described: HATNet, model: HATNet) -> Iterator[str]:
    """Yield what a model would lose on the way through a file: names, shapes, settings, values."""
    state = model.state_dict()
    yield from differences(described.state_dict(), state)
    own, settings = _settings(described), _settings(model)
    if changed := [f"{n} must be {own[n]}, got {settings[n]}" for n in own if settings.get(n, own[n]) != own[n]]:
        yield abbreviate(changed)
    # aminmax of the check below works on plain tensors only; the others are among the differences
    if broken := [name for name, t in state.items() if not storage_problem(t) and not is_finite(t)]:
        yield f"values that are not finite in {abbreviate(broken)}"


def _settings(model: HATNet) -> dict[str, str]:
    """Collect, by module, the settings that no parameter shows: those of attention and activations."""
    settings = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention | HierarchicalAttention | WindowAttention):
            settings[name] = module.extra_repr()
        elif isinstance(module, Mlp | Stem):
            for child in ("act", "act1", "act2"):  # in place or not is the same function
                settings[f"{name}.{child}"] = repr(getattr(module, child, None)).replace("inplace=True", "")
    return settings
