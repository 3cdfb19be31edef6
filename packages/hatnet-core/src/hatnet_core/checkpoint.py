"""Load and save weights: our safetensors files and the checkpoints released with the paper.

Our files hold the parameters under the names of :class:`HATNet` and, as JSON in the safetensors metadata, the
configuration that builds the model. The released ``HAT-Net_*.pth`` use names of their own, listed in
``RELEASED_NAMES``. Nothing is ever unpickled beyond plain tensors (``weights_only=True``).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hatnet_core.__about__ import __version__
from hatnet_core.model import HATNet
from hatnet_core.variants import VARIANTS

logger = logging.getLogger("hatnet_core")

RELEASED_NAMES: list[tuple[str, str]] = [
    (r"^patch_embed\.0\.", "stem.conv1."),
    (r"^patch_embed\.1\.", "stem.norm."),
    (r"^patch_embed\.3\.", "stem.conv2."),
    (r"^ds2\.", "stages.1.downsample."),
    (r"^ds3\.", "stages.2.downsample."),
    (r"^ds4\.", "stages.3.downsample."),
    (r"^blocks\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.ds_norm\.", ".attn.pool_norm."),
    (r"\.conv\.conv1\.0\.", ".mlp.norm."),
    (r"\.conv\.conv1\.1\.", ".mlp.expand."),
    (r"\.conv\.conv2\.0\.", ".mlp.dwconv."),
    (r"\.conv\.conv3\.0\.", ".mlp.project."),
    (r"\.conv\.conv3\.1\.", ".mlp.out_norm."),
    (r"^classifier\.1\.", "head."),
]
"""Regular expressions that turn a released parameter name into ours, applied in order."""

RELEASED_UNUSED = re.compile(r"\.attn\.proj_norm\.(weight|bias)$")
"""Released parameters that take no part in the computation; loading drops them."""


def save_checkpoint(model: HATNet, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write the weights and configuration of ``model`` to a safetensors file, atomically.

    Args:
        model: the model; parameters keep their dtype and are written from any device.
        path: the file; its folder must exist. A file of that name is replaced only when the new one is complete.
        metadata: further values to store beside the configuration, anything JSON can hold.

    Raises:
        ImportError: if safetensors is not installed.
        FileNotFoundError: if the folder does not exist.
        ValueError: if ``metadata`` names ``version``, ``variant`` or ``config``.
    """
    safetensors_torch = _import_safetensors()
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save {path}: folder {path.parent} does not exist")
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    record = {"version": __version__, "variant": _variant(tensors), "config": model.config}
    if taken := record.keys() & (metadata or {}).keys():
        raise ValueError(f"metadata must not hold {', '.join(sorted(taken))}, which describe the model itself")
    record |= metadata or {}
    content = safetensors_torch.save(tensors, {"format": "pt", "hatnet": json.dumps(record)})
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def load_checkpoint(model: HATNet, path: str | Path) -> list[str]:
    """Load weights from one of our safetensors files or a released ``.pth`` into ``model``, strictly.

    Every parameter of the model must be in the file with its shape, and nothing else may be, apart from the unused
    ``proj_norm`` of the released files. On any error the model is unchanged.

    Args:
        model: the model; keeps its device and dtype.
        path: ``*.safetensors`` for ours, any other name for a released checkpoint.

    Returns:
        The released names that were dropped on purpose, empty for our own files; also logged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read, or holds another variant or number of classes.
        ImportError: if the file is safetensors and safetensors is not installed.

    Example:
        >>> from hatnet_core import create_model, load_checkpoint
        >>> model = create_model("hatnet_small")
        >>> load_checkpoint(model, "HAT-Net_Small.pth")  # doctest: +SKIP
    """
    path = Path(path)
    state, dropped = _rename_released(_read_tensors(path))
    _check_same_model(model, state, path)
    if path.suffix == ".safetensors":
        _check_head_dim(model, path)
    model.load_state_dict(state)
    if dropped:
        logger.warning("%s: dropped %d unused proj_norm parameters", path, len(dropped))
    return dropped


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` stored beside the weights, without loading them.

    Returns:
        ``version``, ``variant`` (None for a model that is none of the paper's), ``config`` (arguments of
        :class:`HATNet`), and what was passed as ``metadata``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a safetensors file written by :func:`save_checkpoint`.
        ImportError: if safetensors is not installed.
    """
    _import_safetensors()
    from safetensors import SafetensorError, safe_open

    path = _existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        record = json.loads(header.get("hatnet", "null"))
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
        raise ValueError(f"{path} holds no HAT-Net configuration; expected a file of save_checkpoint")
    return record


def _read_tensors(path: Path) -> dict[str, Tensor]:
    path = _existing_file(path)
    if path.suffix == ".safetensors":
        safetensors_torch = _import_safetensors()
        from safetensors import SafetensorError

        try:
            return dict(safetensors_torch.load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise anything from KeyError to struct.error
        raise ValueError(f"{path} is not a checkpoint of plain tensors: {_first_line(error)}") from error
    plain = isinstance(state, dict) and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items())
    if not plain:
        raise ValueError(f"{path} must hold one dict of parameter names to tensors, as the released files do")
    return state


def _rename_released(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Ours by name; a released state dict with our names, and the names that were dropped."""
    if "patch_embed.0.weight" not in state:
        return dict(state), []
    dropped = [name for name in state if RELEASED_UNUSED.search(name)]
    renamed = {}
    for name, tensor in state.items():
        if name in dropped:
            continue
        ours = name
        for pattern, replacement in RELEASED_NAMES:
            ours = re.sub(pattern, replacement, ours)
        renamed[ours] = tensor
    return renamed, dropped


def _check_same_model(model: HATNet, state: Mapping[str, Tensor], path: Path) -> None:
    """ValueError unless ``state`` has exactly the names and shapes of ``model``, naming what differs."""
    own = model.state_dict()
    missing = sorted(own.keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(state[name].shape)} and should be {tuple(own[name].shape)}"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    shapes += [f"{name} is {t.dtype} and should be floating" for name, t in state.items() if not t.is_floating_point()]
    if not (missing or unknown or shapes):
        return
    details = [f"missing {_some(missing)}"] if missing else []
    details += [f"unknown {_some(unknown)}"] if unknown else []
    details += [_some(shapes)] if shapes else []
    raise ValueError(f"{path} holds {_describe(state)}; expected {_describe(own)}: {'; '.join(details)}")


def _check_head_dim(model: HATNet, path: Path) -> None:
    """ValueError if our file says that its heads, which no shape shows, are of another size."""
    own = model.config["head_dim"]
    try:
        stored = read_metadata(path)["config"].get("head_dim")
    except ValueError:  # a safetensors file without configuration, from elsewhere
        return
    if stored != own:
        raise ValueError(f"{path} holds a model of head_dim={stored}; expected head_dim={own}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _describe(state: Mapping[str, Tensor]) -> str:
    if "stem.conv2.weight" not in state:
        return "no HAT-Net"
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    return f"{_variant(state) or 'a HAT-Net of another configuration'} with {classes} classes"


def _variant(state: Mapping[str, Tensor]) -> str | None:
    """The name of the paper's variant whose widths and depths ``state`` has, if there is one."""
    widths: dict[int, int] = {}
    depths: dict[int, int] = {}
    for name, tensor in state.items():
        if found := re.match(r"stages\.(\d+)\.blocks\.(\d+)\.mlp\.project\.weight", name):
            stage, block = int(found[1]), int(found[2])
            widths[stage] = tensor.shape[0]
            depths[stage] = max(depths.get(stage, 0), block + 1)
    for name, variant in VARIANTS.items():
        if [*widths.values()] == [*variant["embed_dims"]] and [*depths.values()] == [*variant["depths"]]:
            return name
    return None


def _existing_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: expected an existing file")
    return path


def _import_safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "safetensors files need the safetensors package: pip install 'hatnet-core[safetensors]'"
        ) from error
    return safetensors.torch


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
