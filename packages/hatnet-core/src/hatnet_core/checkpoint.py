"""Load and save weights: our safetensors files, the checkpoints released with the paper, and what trainers write.

Our files hold the parameters under the names of :class:`HATNet` and, as JSON in the safetensors metadata, the
configuration that builds the model. :func:`save_checkpoint` compares the two before it writes. The released
``HAT-Net_*.pth`` use names of their own (``released_names.py``); ``foreign.py`` finds the weights in any other file.

A file passes two steps: :func:`read_state` (out of its wrapping, under our names) and the checks of
:func:`load_checkpoint` against the model.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hatnet_core.__about__ import __version__
from hatnet_core.attention import Attention, HierarchicalAttention, WindowAttention
from hatnet_core.config import TRAINED, HATNetConfig
from hatnet_core.foreign import choose_weights, import_safetensors, read_content, some
from hatnet_core.io import atomic_write
from hatnet_core.layers import Mlp, Stem
from hatnet_core.model import HATNet, unwrap
from hatnet_core.variants import MIN_SIZE, list_models, model_arguments
from hatnet_core.zero import read_zero

logger = logging.getLogger("hatnet_core")

WEIGHTS = "model.safetensors"
"""The file of the weights in a folder of hatnet-train, a run or one of its checkpoints."""

SIZE = 224
"""Side in pixels of the images that the paper's models are trained with (Sec. 4.1)."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What parameters may be stored as."""

BUFFERS = (".running_mean", ".running_var", ".num_batches_tracked")
"""Endings of batch-norm statistics, listed after the parameters of a foreign model."""

REMEDIES = (
    ("lora_", "call merge_and_unload() of the PEFT model"),
    (".base_layer.", "call merge_and_unload() of the PEFT model"),
    ("parametrizations", "call torch.nn.utils.parametrize.remove_parametrizations()"),
    ("_orig_mod", "compile its parts in place, by module.compile()"),
    ("_orig", "call torch.nn.utils.prune.remove()"),
    ("DTensor", "gather it, by get_model_state_dict(full_state_dict=True) into a model that is not sharded"),
    ("meta device", "give it storage, by to_empty(), and load weights"),
    ("not finite", "save a model from before its training diverged"),
    ("grid_size", "call set_grid()"),
    ("head.", "call reset_classifier(num_classes)"),
)
"""How to make a model savable, by what its difference from its configuration contains."""


def save_checkpoint(model: nn.Module, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the weights and configuration of ``model`` to a safetensors file, atomically.

    Args:
        model: the model, or one wrapped as :func:`hatnet_core.model.unwrap` undoes; parameters keep their dtype and
            are written from any device. A ``head`` that was replaced by another ``nn.Linear``, or by
            ``nn.Identity``, is written with its own number of classes.
        path: the file, ``*.safetensors``; its folder must exist. A file of that name is replaced only when the new
            one is complete.
        metadata: further values to store with the configuration, anything JSON can hold.

    Raises:
        ImportError: if safetensors is not installed.
        FileNotFoundError: if the folder does not exist.
        TypeError: if ``model`` is not a :class:`HATNet`.
        ValueError: if ``path`` has another ending, ``metadata`` names ``version``, ``variant`` or ``config``, or the
            file could not be loaded: stages were pruned, layers were replaced, wrapped or sharded, or a value is not
            finite. The message names the difference and the remedy.
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
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    record = json.dumps(describe(config, metadata or {}))
    with atomic_write(path) as part:
        safetensors_torch.save_file(tensors, part, {"format": "pt", "hatnet": record})


def saved_config(model: HATNet) -> HATNetConfig:
    """Configuration that rebuilds ``model`` as it is now, its head included.

    Raises:
        ValueError: naming the first difference and its remedy, if the configuration builds another model.
    """
    config = model.config
    if len(model.stages) != len(config.depths):
        raise ValueError(f"the model was pruned to {len(model.stages)} of its stages; save it before pruning")
    if type(model.head) in (nn.Linear, nn.Identity):
        config = config.replace(num_classes=getattr(model.head, "out_features", 0))
    with torch.device("meta"):
        described = HATNet(**config)
    if difference := "; ".join(_differences_from(described, model)):
        remedy = next((way for word, way in REMEDIES if word in difference), "torch.save() its state_dict() instead")
        raise ValueError(f"the model is not the one of its configuration, {difference}: {remedy}")
    return config


def _differences_from(described: HATNet, model: HATNet) -> Iterator[str]:
    """What would keep ``model`` from coming back: names, shapes, kinds, settings without parameters, values."""
    state = model.state_dict()
    yield from _differences(described.state_dict(), state)
    own, settings = _settings(described), _settings(model)
    if different := [f"{n} is {settings[n]} and should be {own[n]}" for n in own if settings.get(n, own[n]) != own[n]]:
        yield some(different)
    if broken := [name for name, t in state.items() if not _kind(t) and not _is_finite(t)]:
        yield f"values that are not finite in {some(broken)}"


def _settings(model: HATNet) -> dict[str, str]:
    """Settings of the attentions and activations by name; no parameter shows them."""
    settings = {}
    for name, module in model.named_modules():
        if isinstance(module, Attention | HierarchicalAttention | WindowAttention):
            settings[name] = module.extra_repr()
        elif isinstance(module, Mlp | Stem):
            for child in ("act", "act1", "act2"):
                settings[f"{name}.{child}"] = repr(getattr(module, child, None)).replace("inplace=True", "")
    return settings


def describe(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Record of our files: version, variant, configuration, and ``metadata``.

    Raises:
        ValueError: if ``metadata`` names ``version``, ``variant`` or ``config``.
    """
    record = {"version": __version__, "variant": variant_name(config), "config": dict(config)}
    if taken := record.keys() & metadata.keys():
        raise ValueError(f"metadata must not hold {', '.join(sorted(taken))}, which describe the model itself")
    return record | dict(metadata)


def load_checkpoint(model: nn.Module, path: str | Path, drop_head: bool = False, key: str | None = None) -> list[str]:
    """Load weights into ``model`` from one of our safetensors files, a released ``.pth`` or a trainer's checkpoint.

    The weights are found by their names, in any dict of the file and behind any prefix. Loading is strict: every
    parameter of the model must be there with its shape, finite. Nothing else may be there, apart from the unused
    ``proj_norm`` of the released files and what is not behind the prefix, such as a detector's neck or a criterion.
    Weights for three input channels are adapted to a model of another number as timm does: summed for one channel,
    else repeated and scaled. On any error the model is unchanged.

    If the file holds several sets of weights, such as ``model`` and ``model_ema``, the one that has all names of the
    model is taken; of several, moving averages last, then in the order ``state_dict``, ``model``, ``module``, then in
    the order of the file. The choice is logged.

    Args:
        model: the model, or one wrapped as :func:`hatnet_core.model.unwrap` undoes; keeps its device, dtype, G1 and
            G2.
        path: ``*.safetensors``, any other name for a file of ``torch.save``, a folder of hatnet-train that holds a
            ``model.safetensors``, or the folder of a DeepSpeed checkpoint of any ZeRO stage (see ``zero.py``).
        drop_head: keep the classifier of the model and ignore that of the file, of whatever size.
        key: the key of a dict, or the prefix, that the weights are under, such as ``model_ema``.

    Returns:
        The names in the file that were dropped on purpose, empty for our own files; also logged.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if ``model`` is not a :class:`HATNet`.
        ValueError: if the file cannot be read, holds another model or number of classes, or values that are not
            finite.
        ImportError: if the file is safetensors and safetensors is not installed.

    Example:
        >>> from hatnet_core import create_model, load_checkpoint
        >>> model = create_model("hatnet_small")
        >>> load_checkpoint(model, "HAT-Net_Small.pth")  # doctest: +SKIP
    """
    path, model = Path(path), unwrap(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError(f"cannot load {path} into a model on the meta device; give it storage first, by to_empty()")
    names = [name for name in model.state_dict() if not (drop_head and name.startswith("head."))]
    state, dropped = read_state(path, key, names)
    dropped += _load_state(model, state, path, drop_head)
    _log_dropped(path, dropped)
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
    head_remedy = "" if drop_head else "drop_head=True keeps the head of the model"
    _check_same_parameters(kept, state, path, "create_model('{}') builds that", head_remedy)
    _check_same_arguments(model, path)
    state = {name: t.to(kept[name].dtype) for name, t in state.items()}
    if broken := [name for name, t in state.items() if not _is_finite(t)]:
        raise ValueError(f"{path} holds values that are not finite as {kept[broken[0]].dtype}, in {some(broken)}")
    model.load_state_dict(state, strict=not drop_head)
    return dropped


def load_model(path: str | Path, variant: str | None = None, key: str | None = None) -> HATNet:
    """The model that a checkpoint holds, with its weights.

    Args:
        path: as in :func:`load_checkpoint`.
        variant: name of the model, for files that do not say it; the classes and input channels are the file's.
        key: as in :func:`load_checkpoint`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not say which model it holds, says so of another than its weights are of, however
            large, or as :func:`load_checkpoint` does.
        ImportError: if the file is safetensors and safetensors is not installed.
    """
    path = Path(path)
    state, dropped = read_state(path, key)
    if variant is not None:
        config = {**model_arguments(variant), "num_classes": head_size(state), "in_chans": stem_channels(state)}
    elif has_metadata(path):
        config = read_metadata(path)["config"]
    else:
        raise ValueError(f"{path} does not say which model it holds: name it with variant=NAME")
    model = build_loaded(HATNet, config, path, state, path)
    _log_dropped(path, dropped)
    return model


def build_loaded(
    kind: type[HATNet],
    config: Mapping[str, Any],
    origin: str | Path,
    state: dict[str, Tensor],
    path: Path,
    device: str | torch.device | None = None,
) -> HATNet:
    """Build the model of a stored configuration once, and give it the weights of a file.

    Args:
        kind: :class:`HATNet` or a subclass.
        config: its arguments.
        origin: where they were read, for the error.
        state: what :func:`read_state` returns.
        path: where it was read.
        device: where the model is put; by default torch's.

    Raises:
        ValueError: as :func:`build_model` and :func:`load_checkpoint`, before anything of the model's size is made.
    """
    depths = config.get("depths")
    if isinstance(depths, list) and all(type(depth) is int for depth in depths) and sum(depths) > len(state):
        raise ValueError(
            f"{origin} says that it holds {sum(depths)} blocks, but has no more than {len(state)} tensors"
        )
    device = torch.get_default_device() if device is None else device
    with torch.device("meta"):
        model = build_model(config, origin, kind)
    adapted = _adapt_in_chans(state, model.in_chans, path)
    _check_same_parameters(model.state_dict(), adapted, path, "name it with variant={}")
    model.to_empty(device=device)
    _load_state(model, adapted, path)
    return model


def build_model(config: Mapping[str, Any], origin: str | Path, kind: type[HATNet] = HATNet) -> HATNet:
    """The model of a stored configuration, with fresh weights.

    Args:
        config: arguments of :class:`HATNet`.
        origin: where they were read, for the error.
        kind: :class:`HATNet` or a subclass.

    Raises:
        ValueError: if they are not arguments of :class:`HATNet`, or out of range.
    """
    try:
        return kind(**config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # the latter two of torch, about the size
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{origin} holds a configuration that builds no HAT-Net: {reason}") from error


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
    import_safetensors()
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
        raise ValueError(
            f"{path} holds no HAT-Net configuration, as a file of save_checkpoint does; "
            "where a model is loaded, name it with variant=NAME"
        )
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


def read_state(
    path: str | Path, key: str | None = None, names: Collection[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights in a checkpoint under the names of :class:`HATNet`, whoever wrote it, and the dropped names.

    Args:
        path: as in :func:`load_checkpoint`.
        key: as in :func:`load_checkpoint`.
        names: parameters of the model they are for, if it is known.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or holds no state dict of plain tensors.
        ImportError: if the file is safetensors and safetensors is not installed.
    """
    path = _inside(path)
    content = read_zero(path) if path.is_dir() else read_content(_existing_file(path))
    weights = choose_weights(content, path, key, names)
    return weights.tensors, list(weights.dropped)


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


def _check_same_parameters(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, remedy: str, head_remedy: str = ""
) -> None:
    """ValueError unless ``state`` has exactly the names and shapes of ``own``, naming what differs.

    Where the file holds another of the paper's models, ``remedy`` is the way to take it, its name in place of braces;
    where only the number of classes differs, ``head_remedy`` is.
    """
    differences = list(_differences(own, state))
    if not differences:
        return
    held = _describe(state)
    if head_size(own) != head_size(state) and _body_shapes(own) == _body_shapes(state):
        remedy = head_remedy
    if not held.startswith("hatnet_"):
        remedy = ""
    details = [*differences, *filter(None, [remedy.format(held.partition(" ")[0])])]
    raise ValueError(f"{path} holds {held}; expected {_describe(own)}: {'; '.join(details)}")


def _differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Iterator[str]:
    """Names, shapes and kinds of ``state`` that are not those of ``own``, some of each."""
    if missing := sorted(own.keys() - state.keys()):
        yield f"missing {some(missing)}"
    if unknown := sorted(state.keys() - own.keys(), key=lambda name: (name.endswith(BUFFERS), name)):
        yield f"unknown {some(unknown)}"
    if shapes := [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]:
        yield some(shapes)
    if kinds := [
        f"{name} is {_kind(t)} and should be dense, of a floating dtype"
        for name, t in state.items()
        if name in own and _kind(t)
    ]:
        yield some(kinds)


def _kind(t: Tensor) -> str:
    """What a tensor is, if it is not a plain one that can be stored; empty if it is."""
    if type(t) not in (Tensor, nn.Parameter):
        return f"a {type(t).__name__}"
    if t.is_meta:
        return "on the meta device"
    if t.dtype not in DTYPES or t.layout != torch.strided:
        return f"{t.layout} of {t.dtype}"
    return ""


def _is_finite(t: Tensor) -> bool:
    """Both extremes are finite; six times as fast as asking each value."""
    return all(extreme.isfinite().item() for extreme in torch.aminmax(t))


def _check_same_arguments(model: HATNet, path: Path) -> None:
    """ValueError if our file was trained with other arguments that no shape shows: the heads, the activation."""
    stored = find_metadata(path).get("config", {})
    for name in ("head_dim", "activation"):
        own = model.config[name]
        if stored.get(name, own) != own:
            raise ValueError(f"{path} holds a model of {name}={stored[name]}; expected {name}={own}")


def _log_dropped(path: Path, dropped: list[str]) -> None:
    if dropped:
        parameters = "parameter" if len(dropped) == 1 else "parameters"
        logger.warning("%s: dropped %d %s: %s", path, len(dropped), parameters, some(dropped))


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
