"""Models by name: ours, ``timm/…``, and configs of MMDetection or MMSegmentation.

timm and hatnet-dense are optional, and imported only for a name that needs them. All weights are random, nothing is
downloaded.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hatnet_core import create_model, list_models
from hatnet_core.checkpoint import find_metadata
from hatnet_core.checkpoint import load_model as load_checkpoint_model

FORMS = "one of {ours}, timm/NAME, or a config of MMDetection or MMSegmentation"


def load_model(name: str, size: tuple[int, int] | None = None) -> nn.Module:
    """Build a model with random weights, for images of one size.

    Args:
        name: ``hatnet_small`` or another name from :func:`hatnet_core.list_models`; the path of a run of hatnet-train,
            whose weights are loaded; ``timm/resnet50``, with or without
            a tag; a config of hatnet-dense by its name, of MMDetection or MMSegmentation as ``mmdet::retinanet/…py``,
            or its file.
        size: height and width in pixels, for models of timm with a fixed size; their own by default.

    Raises:
        ValueError: if the name is unknown, or the model refuses the size.
        ImportError: if the library for this kind of name is not installed.
    """
    return _builder(name)(size)


def is_checkpoint(name: str) -> bool:
    """Return whether a name is the path of a checkpoint that records its model, such as a run of hatnet-train."""
    path = Path(name)
    return (path.is_dir() or path.suffix == ".safetensors") and path.exists() and bool(find_metadata(path))


def recorded_top1(name: str) -> float | None:
    """Return the top-1 (%) that a checkpoint records, on the data that it was trained for; None without."""
    top1 = find_metadata(name).get("top1") if is_checkpoint(name) else None
    return top1 if isinstance(top1, int | float) else None


def check_name(name: str) -> str:
    """Return ``name``; raise the errors of :func:`load_model` that are known without building the model."""
    _builder(name)
    return name


def _builder(name: str) -> Callable[[tuple[int, int] | None], nn.Module]:
    if name in list_models(ablations=True):
        return lambda size: create_model(name)
    if name.startswith("timm/"):
        return _timm_builder(name.removeprefix("timm/"))
    if is_checkpoint(name):
        return lambda size: load_checkpoint_model(name)
    if "::" in name or name.endswith(".py") or _is_dense_config(name):
        return _dense_builder(name)
    known = list_models(ablations=True)
    alike = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {alike[0]}?" if alike else ""
    raise ValueError(f"model must be {FORMS.format(ours=', '.join(list_models()))}, got {name!r}{hint}")


def _timm_builder(name: str) -> Callable[[tuple[int, int] | None], nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm/{name} needs timm: pip install 'hatnet-analysis[timm]'") from error
    if not timm.is_model(name):
        alike = ", ".join(f"timm/{found}" for found in difflib.get_close_matches(name, timm.list_models(), n=3))
        close = f", such as {alike}" if alike else ""
        raise ValueError(f"model must be timm/ and a name from timm.list_models(){close}, got 'timm/{name}'")
    tagged = timm.models.get_arch_pretrained_cfgs(name.partition(".")[0])
    if "." in name and name not in tagged:
        raise ValueError(f"tag of a model must be one of {', '.join(tagged) or 'none'}, got 'timm/{name}'")

    def build(size: tuple[int, int] | None) -> nn.Module:
        model: nn.Module = timm.create_model(name)
        if size is None or "img_size" not in inspect.signature(type(model).__init__).parameters:
            return model
        try:
            return timm.create_model(name, img_size=size)
        except (AssertionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"timm/{name} cannot be built for {size[0]}×{size[1]}: {reason}") from error

    return build


def _is_dense_config(name: str) -> bool:
    """Return whether hatnet-dense has a config of this name, without importing it, which takes seconds."""
    spec = find_spec("hatnet_dense")
    folders = (spec.submodule_search_locations if spec else None) or []
    return any(Path(folder, "configs", f"{name}.py").is_file() for folder in folders if Path(name).name == name)


def _dense_builder(name: str) -> Callable[[tuple[int, int] | None], nn.Module]:
    config = _dense_config(name)
    from hatnet_dense.flops import traceable

    return lambda size: traceable(config)


def with_backbone(head: str, backbone: str) -> nn.Module:
    """Build the detector or segmenter of one config with the backbone of another, as in Tables 3 and 4.

    Args:
        head: config of MMDetection or MMSegmentation, unchanged but for the backbone and the neck's inputs.
        backbone: config of either library, whose backbone is taken.

    Raises:
        ImportError: if hatnet-dense is not installed.
    """
    from hatnet_dense.flops import traceable

    config, channels = _dense_config(head), _backbone_channels(backbone)
    config.model.backbone = _scoped_backbone(backbone)
    config.model.neck.in_channels = channels
    return traceable(config)


def classifier(backbone: str) -> nn.Module:
    """Build a classifier of ImageNet's 1000 classes: a config's backbone, average pool and a linear layer."""
    from mmengine.registry import MODELS, init_default_scope

    _dense_config(backbone)
    init_default_scope("mmdet")
    features = MODELS.build(_scoped_backbone(backbone))
    return _Classifier(features, _backbone_channels(backbone)[-1], 1000)


class _Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, num_classes]."""
        return self.head(self.backbone(x)[-1].mean((-2, -1)))


def _dense_config(name: str) -> Any:
    if find_spec("hatnet_dense") is None:
        raise ImportError(f"{name} needs hatnet-dense: pip install 'hatnet-analysis[dense]'")
    from hatnet_dense.config import load_config

    return load_config(name)


def _scoped_backbone(name: str) -> Any:
    """Return the backbone of a config, its type prefixed with its library, without pretrained weights."""
    config = _dense_config(name)
    backbone = config.model.backbone
    import_module(f"{config.default_scope}.models")  # registers it
    backbone.type = f"{config.default_scope}.{backbone.type}"
    for key in ("init_cfg", "pretrained"):
        backbone.pop(key, None)
    return backbone


def _backbone_channels(name: str) -> list[int]:
    """Return the channels of the maps that a config's neck takes, or, without one, its decode head."""
    model = _dense_config(name).model
    return list(model.get("neck", model.get("decode_head")).in_channels)


@contextmanager
def refusals(name: str, size: tuple[int, int], batch: int = 1) -> Iterator[None]:
    """Turn any error of a model that is built or run into a ValueError of one line that names model and size.

    A ValueError, ImportError or OSError that names the model passes unchanged.
    """
    try:
        yield
    except (ValueError, ImportError, OSError) as error:
        if name in str(error):
            raise
        raise _refusal(name, size, batch, error) from error
    except Exception as error:  # a library's model may raise anything, and lack of memory has errors of its own
        raise _refusal(name, size, batch, error) from error


def _refusal(name: str, size: tuple[int, int], batch: int, error: Exception) -> ValueError:
    images = f"{batch} images of " if batch > 1 else ""
    refused = f"cannot run {name} at {images}{size[0]}×{size[1]}"
    reason = str(error).strip().partition("\n")[0]
    if reason and isinstance(error, ValueError | ImportError | OSError):  # names what was expected
        return ValueError(f"{refused}: {reason}")
    if not reason or isinstance(error, LookupError | TypeError | AttributeError):
        reason = f"{type(error).__name__}: {reason}".removesuffix(": ")  # such a message needs its type
    return ValueError(f"{refused}: {reason}")


def on_meta(name: str) -> nn.Module:
    """Build a model at its own size, on the meta device where its kind allows, to count its parameters."""
    if name in list_models(ablations=True):
        with torch.device("meta"):
            return create_model(name)
    return load_model(name)
