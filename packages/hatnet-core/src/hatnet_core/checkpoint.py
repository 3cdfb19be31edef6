"""Load and save weights: our safetensors files, the checkpoints released with the paper, and what trainers write.

Our files hold the parameters under the names of :class:`HATNet` and, as JSON in the safetensors metadata, the
configuration that builds the model. The released ``HAT-Net_*.pth`` use names of their own (``released_names.py``).
Nothing is ever unpickled beyond plain tensors (``weights_only=True``).

A file passes two steps: :func:`read_state` (out of its wrapping, under our names) and the checks of
:func:`load_checkpoint` against the model.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hatnet_core.__about__ import __version__
from hatnet_core.config import TRAINED, HATNetConfig
from hatnet_core.model import HATNet
from hatnet_core.released_names import rename_released
from hatnet_core.variants import MIN_SIZE, list_models, model_arguments
from hatnet_core.zero import read_zero

logger = logging.getLogger("hatnet_core")

WEIGHTS = "model.safetensors"
"""The file of the weights in a folder of hatnet-train, a run or one of its checkpoints."""

WRAPPERS = ("state_dict", "model", "module")
"""Keys under which trainers store the state dict; ``module`` is DeepSpeed's."""

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What data-parallel wrappers, ``torch.compile`` and owning modules put before every name."""

BACKBONE_PREFIX = "backbone."
"""What detectors and segmenters put before the names of their backbone, beside their own."""

SIZE = 224
"""Side in pixels of the images that the paper's models are trained with (Sec. 4.1)."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What parameters may be stored as."""


def save_checkpoint(model: HATNet, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the weights and configuration of ``model`` to a safetensors file, atomically.

    Args:
        model: the model; parameters keep their dtype and are written from any device.
        path: the file, ``*.safetensors``; its folder must exist. A file of that name is replaced only when the new
            one is complete.
        metadata: further values to store beside the configuration, anything JSON can hold.

    Raises:
        ImportError: if safetensors is not installed.
        FileNotFoundError: if the folder does not exist.
        ValueError: if ``path`` has another ending, ``metadata`` names ``version``, ``variant`` or ``config``, or
            stages of the model were pruned.
    """
    safetensors_torch = _import_safetensors()
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot save {path}: the name must end in .safetensors")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save {path}: folder {path.parent} does not exist")
    if len(model.stages) != len(model.config["depths"]):
        raise ValueError(f"cannot save {path}: the model was pruned to {len(model.stages)} of its stages")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    record = json.dumps(describe(model.config, metadata or {}))
    content = safetensors_torch.save(tensors, {"format": "pt", "hatnet": record})
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def describe(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside the weights in our files: version, variant, configuration, and ``metadata``.

    Raises:
        ValueError: if ``metadata`` names ``version``, ``variant`` or ``config``.
    """
    record = {"version": __version__, "variant": variant_name(config), "config": dict(config)}
    if taken := record.keys() & metadata.keys():
        raise ValueError(f"metadata must not hold {', '.join(sorted(taken))}, which describe the model itself")
    return record | dict(metadata)


def load_checkpoint(model: HATNet, path: str | Path, drop_head: bool = False) -> list[str]:
    """Load weights into ``model`` from one of our safetensors files, a released ``.pth`` or a trainer's checkpoint.

    The state dict may lie under ``state_dict``, ``model`` or ``module`` (DeepSpeed), its names behind ``module.``,
    ``_orig_mod.``, ``model.`` or ``backbone.``. Loading is strict: every parameter of the model must be in the file
    with its shape, finite, and nothing else may be, apart from the unused ``proj_norm`` of the released files and
    what lies beside a ``backbone.``. Weights for three input channels are adapted to a model of another number as
    timm does: summed for one channel, else repeated and scaled. On any error the model is unchanged.

    Args:
        model: the model; keeps its device, dtype, G1 and G2.
        path: ``*.safetensors``, any other name for a file of ``torch.save``, a folder of hatnet-train that holds a
            ``model.safetensors``, or the folder of a DeepSpeed checkpoint of any ZeRO stage (see ``zero.py``).
        drop_head: leave the classifier of the model as it is and ignore that of the file, of whatever size.

    Returns:
        The names in the file that were dropped on purpose, empty for our own files; also logged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, holds another model or number of classes, or values that are not
            finite.
        ImportError: if the file is safetensors and safetensors is not installed.

    Example:
        >>> from hatnet_core import create_model, load_checkpoint
        >>> model = create_model("hatnet_small")
        >>> load_checkpoint(model, "HAT-Net_Small.pth")  # doctest: +SKIP
    """
    path = Path(path)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"cannot load {path} into a model on the meta device; give it storage first, by to_empty()")
    state, dropped = read_state(path)
    dropped += _load_state(model, state, path, drop_head)
    _tell_dropped(path, dropped)
    return dropped


def _load_state(model: HATNet, state: dict[str, Tensor], path: Path, drop_head: bool = False) -> list[str]:
    """Check what :func:`read_state` took out of ``path`` and load it; the names that were dropped."""
    dropped = []
    kept = model.state_dict()
    if drop_head:
        dropped = [name for name in state if name.startswith("head.")]
        state = {name: t for name, t in state.items() if not name.startswith("head.")}
        kept = {name: t for name, t in kept.items() if not name.startswith("head.")}
    state = _adapt_in_chans(state, model.in_chans, path)
    _check_same_parameters(kept, state, path)
    _check_same_arguments(model, path)
    state = {name: t.to(kept[name].dtype) for name, t in state.items()}
    if broken := [name for name, t in state.items() if not t.isfinite().all()]:
        raise ValueError(f"{path} holds values that are not finite as {kept[broken[0]].dtype}, in {_some(broken)}")
    model.load_state_dict(state, strict=not drop_head)
    return dropped


def load_model(path: str | Path, variant: str | None = None) -> HATNet:
    """The model that a checkpoint holds, with its weights.

    Args:
        path: as in :func:`load_checkpoint`.
        variant: name of the model, for files that do not say it; the classes and input channels are the file's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not say which model it holds, says so of another than its weights are of, however
            large, or as :func:`load_checkpoint` does.
        ImportError: if the file is safetensors and safetensors is not installed.
    """
    path = Path(path)
    state, dropped = read_state(path)
    if variant is not None:
        config = {**model_arguments(variant), "num_classes": head_size(state), "in_chans": stem_channels(state)}
    elif has_metadata(path):
        config = read_metadata(path)["config"]
        _check_extent(config, state, path)
    else:
        raise ValueError(f"{path} does not say which model it holds: name it with --variant")
    model = build_model(config, path)
    _load_state(model, state, path)
    _tell_dropped(path, dropped)
    return model


def build_model(config: Mapping[str, Any], origin: str | Path) -> HATNet:
    """The model of a stored configuration, with fresh weights.

    Args:
        config: arguments of :class:`HATNet`.
        origin: where they were read, for the error.

    Raises:
        ValueError: if they are not arguments of :class:`HATNet`, or out of range.
    """
    try:
        return HATNet(**config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the latter two of torch, about the size
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{origin} holds a configuration that builds no HAT-Net: {reason}") from error


def _check_extent(config: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    """ValueError, before anything of its size is made, if a configuration is of another model than the weights."""
    depths = config.get("depths")
    if isinstance(depths, list) and all(type(depth) is int for depth in depths) and sum(depths) > len(state):
        raise ValueError(f"{path} says that it holds {sum(depths)} blocks, but has no more than {len(state)} tensors")
    with torch.device("meta"):
        described = build_model(config, path)
    _check_same_parameters(described.state_dict(), state, path)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` stored beside the weights, without loading them.

    Args:
        path: the file, or a folder as in :func:`load_checkpoint`.

    Returns:
        ``version``, ``variant`` (None for a model that is none of the paper's), ``config`` (arguments of
        :class:`HATNet`), and what was passed as ``metadata``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file written by :func:`save_checkpoint`.
        ImportError: if safetensors is not installed.
    """
    path = _existing_file(path)
    _import_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        record = json.loads(header.get("hatnet", "null"))
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} holds no HAT-Net configuration; expected a file of save_checkpoint")
    return record


def find_metadata(path: str | Path) -> dict[str, Any]:
    """What :func:`read_metadata` reads; nothing from a checkpoint that does not describe its model.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the file is safetensors and safetensors is not installed.
    """
    try:
        return read_metadata(path) if has_metadata(path) else {}
    except ValueError:
        return {}


def trained_size(path: str | Path | None, high: int) -> tuple[int, int]:
    """Height and width in pixels of the images that a checkpoint was trained with; 224 where it does not say.

    Args:
        path: as in :func:`load_checkpoint`; None for a model that comes from none.
        high: the largest side that is expected.

    Raises:
        ValueError: if it says anything but a whole number of pixels up to ``high``.
        FileNotFoundError: if there is no such file.
    """
    side = SIZE if path is None else find_metadata(path).get("image_size", SIZE)
    if type(side) is not int or not MIN_SIZE <= side <= high:
        raise ValueError(f"{path} holds image_size={side!r}; expected a whole number from {MIN_SIZE} to {high}")
    return side, side


def has_metadata(path: str | Path) -> bool:
    """Whether a checkpoint can describe its model: a safetensors file, or a folder with one."""
    return _inside(path).suffix == ".safetensors"


def read_state(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a checkpoint under the names of :class:`HATNet`, whoever wrote it, and the dropped names.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or holds no state dict of plain tensors.
        ImportError: if the file is safetensors and safetensors is not installed.
    """
    path = _inside(path)
    tensors = _unwrapped(read_zero(path), path) if path.is_dir() else _read_tensors(_existing_file(path))
    state, beside = _without_prefixes(tensors)
    state, unused = rename_released(state)
    return state, beside + unused


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, taken out of the dicts that trainers wrap it in; its names as they are."""
    if path.suffix == ".safetensors":
        safetensors_torch = _import_safetensors()
        from safetensors import SafetensorError

        try:
            return dict(safetensors_torch.load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # trainers store their arguments beside
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise anything from KeyError to struct.error
        raise ValueError(f"{path} is not a checkpoint of plain tensors: {_refused(path)}") from error
    return _unwrapped(content, path)


def _unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(len(WRAPPERS)):  # one may be inside another
        if isinstance(content, Mapping):
            content = next((content[key] for key in WRAPPERS if key in content), content)
    plain = isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items()
    )
    if not plain:
        raise ValueError(
            f"{path} must hold a dict of parameter names to tensors, as the released files do, "
            f"or one under {', '.join(WRAPPERS)}"
        )
    return dict(content)


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict without the prefixes of wrappers, and the names beside a ``backbone.``, which are dropped."""
    dropped: list[str] = []
    while prefix := _prefix(state):
        dropped += [name for name in state if not name.startswith(prefix)]
        state = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    return state, dropped


def _prefix(state: Mapping[str, Tensor]) -> str:
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return prefix
    return BACKBONE_PREFIX if any(name.startswith(BACKBONE_PREFIX) for name in state) else ""


def _adapt_in_chans(state: dict[str, Tensor], in_chans: int, path: Path) -> dict[str, Tensor]:
    """``state`` with a stem for three channels turned into one for ``in_chans``, as timm's adapt_input_conv does."""
    name = "stem.conv1.weight"
    weight = state.get(name)
    if weight is None or weight.ndim != 4 or weight.shape[1] != 3 or in_chans == 3:
        return state
    if in_chans == 1:
        adapted = weight.sum(1, keepdim=True)
    else:
        repeated = weight.repeat(1, math.ceil(in_chans / 3), 1, 1)[:, :in_chans]
        adapted = repeated * (3 / in_chans)
    logger.warning("%s: adapted %s from 3 to %d input channels", path, name, in_chans)
    return {**state, name: adapted}


def _check_same_parameters(own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    """ValueError unless ``state`` has exactly the names and shapes of ``own``, naming what differs."""
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    kinds = [
        f"{name} is {t.layout} of {t.dtype} and should be dense, of a floating dtype"
        for name, t in state.items()
        if t.dtype not in DTYPES or t.layout != torch.strided
    ]
    if not (missing or unknown or shapes or kinds):
        return
    holds = _describe(state)
    listed = _some if holds.startswith("hatnet_") else ", ".join  # one of the paper's, just not the one expected
    details = [f"missing {listed(missing)}"] if missing else []
    details += [f"unknown {listed(unknown)}"] if unknown else []
    details += [listed(different) for different in (shapes, kinds) if different]
    raise ValueError(f"{path} holds {holds}; expected {_describe(own)}: {'; '.join(details)}")


def _check_same_arguments(model: HATNet, path: Path) -> None:
    """ValueError if our file was trained with other arguments that no shape shows: the heads, the activation."""
    stored = find_metadata(path).get("config", {})
    for name in ("head_dim", "activation"):
        own = model.config[name]
        if stored.get(name, own) != own:
            raise ValueError(f"{path} holds a model of {name}={stored[name]}; expected {name}={own}")


def _tell_dropped(path: Path, dropped: list[str]) -> None:
    if dropped:
        logger.warning("%s: dropped %d parameters: %s", path, len(dropped), _some(dropped))


def _some(texts: list[str]) -> str:
    shown = ", ".join(texts[:3])
    return f"{shown} and {len(texts) - 3} more" if len(texts) > 3 else shown


def _describe(state: Mapping[str, Tensor]) -> str:
    if "stem.conv2.weight" not in state:
        return "no HAT-Net"
    shapes = _body_shapes(state)
    classes = f" with {head_size(state)} classes" if head_size(state) else ""  # none where the classifier is left out
    for name in list_models(ablations=True):
        with torch.device("meta"):
            if _body_shapes(HATNet(**model_arguments(name)).state_dict()) == shapes:
                return name + classes
    return f"a HAT-Net of another configuration{classes}"


def head_size(state: Mapping[str, Tensor]) -> int:
    """The number of classes of the classifier in a state dict, 0 without one."""
    weight = state.get("head.weight")
    return 0 if weight is None or weight.ndim != 2 else weight.shape[0]


def stem_channels(state: Mapping[str, Tensor]) -> int:
    """The number of input channels of the stem in a state dict, 3 without one."""
    weight = state.get("stem.conv1.weight")
    return 3 if weight is None or weight.ndim != 4 else weight.shape[1]


def _body_shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in state.items() if not name.startswith(("head.", "stem.conv1."))}


def variant_name(config: Mapping[str, Any]) -> str | None:
    """The name of the paper's model that ``config`` is, up to what can change around the weights; None if none."""
    for name in list_models(ablations=True):
        arguments = HATNetConfig(**model_arguments(name))
        if all(config[key] == arguments[key] for key in TRAINED):
            return name
    return None


def _inside(path: str | Path) -> Path:
    """The file of the weights, if ``path`` is a folder of hatnet-train."""
    path = Path(path)
    return path / WEIGHTS if (path / WEIGHTS).is_file() else path


def _existing_file(path: str | Path) -> Path:
    path = _inside(path)
    if path.is_dir():
        raise ValueError(f"{path} holds no {WEIGHTS}, which describes its model")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: expected an existing file or folder")
    return path


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors files need the safetensors package: pip install 'hatnet-core[safetensors]'"
        ) from error
    return safetensors.torch


def _refused(path: Path) -> str:
    """Why ``torch.load`` would not read a file, without its advice to switch the protection off."""
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # as above: the file may hold anything
        foreign = []
    if foreign:
        return f"it also holds {', '.join(foreign)}, and to unpickle such objects could run code of the file"
    return "it is damaged or of another format"
