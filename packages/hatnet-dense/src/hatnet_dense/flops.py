"""Parameters and FLOPs of a whole detector or segmenter, in the two conventions of ``hatnet_core.flop_handles``.

One multiply-add is one FLOP in both: ``paper`` counts convolutions, linear layers and normalisations, ``complete`` the
products of two activations as well, those of the attention. MMEngine counts, by running the model on one image: the
network without post-processing; a two-stage detector includes its heads on the proposals that its first stage keeps.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from hatnet_core.flop_handles import HANDLES, conventions
from hatnet_dense.errors import cut, said


def build_model(config: Config) -> Any:
    """The model of a config with random weights, in evaluation mode.

    Raises:
        ValueError: if it cannot be built, whatever the libraries make of that.
    """
    init_default_scope(config.default_scope)
    registry = import_module(f"{config.default_scope}.registry").MODELS
    try:
        return revert_sync_batchnorm(registry.build(config.model)).eval()
    except Exception as error:  # an unknown type, an argument that there is not, a value that does not fit
        raise ValueError(f"cannot build the model of this config: {cut(said(error))}") from error


def count(config: Config, height: int, width: int) -> dict[str, Any]:
    """Count parameters and FLOPs.

    Args:
        config: of :func:`hatnet_dense.config.load_config`.
        height: H of the image in pixels.
        width: W, likewise.

    Returns:
        ``params``, ``flops_paper`` and ``flops_complete`` of the model, and, after ``backbone_``, of its backbone;
        ``uncounted_ops``, the operators that neither convention counts, most of them elementwise. An operator of
        MMCV's own, such as deformable attention, is among them.

    Raises:
        ValueError: if the model cannot be built, or not be run on such an image.
    """
    module = traceable(config)
    model: Any = module.model
    analysis = FlopAnalyzer(module, torch.zeros(1, 3, height, width))
    analysis.set_op_handle(**HANDLES)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the tracer, about what the libraries do with shapes
        try:
            whole, backbone = analysis.by_operator("model"), analysis.by_operator("model.backbone")
        except RuntimeError as error:  # memory, or maps too small for a layer
            raise ValueError(f"cannot run this model on {height}×{width}: {said(error)}") from error
    return {
        "params": _params(model),
        **_conventions("flops", whole),
        "backbone_params": _params(model.backbone),
        **_conventions("backbone_flops", backbone),
        "uncounted_ops": sorted(analysis.unsupported_ops("model")),
    }


def traceable(config: Config) -> nn.Module:
    """The model of a config as tracers want it, images [B, 3, H, W] → a tuple of tensors, under the name ``model``.

    Its random weights are the same every time, since a two-stage detector keeps as many proposals as they say.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build_model(config)
    return _Tensors(model, config.default_scope)


class _Tensors(nn.Module):
    """Tensors in, tensors out."""

    def __init__(self, model: nn.Module, library: str) -> None:
        super().__init__()
        self.model = model
        self.library = library

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        shape = tuple(images.shape[-2:])
        meta: dict[str, Any] = {"img_shape": shape, "ori_shape": shape, "pad_shape": shape, "batch_input_shape": shape}
        meta["scale_factor"] = (1.0, 1.0)
        name = "DetDataSample" if self.library == "mmdet" else "SegDataSample"
        sample = getattr(import_module(f"{self.library}.structures"), name)
        samples = [sample(metainfo=meta) for _ in range(len(images))]
        return tuple(_tensors(self.model(images, samples, mode="tensor")))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _conventions(name: str, operators: Counter[str]) -> dict[str, int]:
    paper, complete = conventions(operators)
    return {f"{name}_paper": paper, f"{name}_complete": complete}


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
