"""Count parameters and FLOPs of a detector or segmenter, in the two conventions of ``hatnet_core.flop_handles``.

One multiply-add is one FLOP. ``paper`` counts convolutions, linear layers and normalisations; ``complete`` also counts
the matrix products of the attention. MMEngine counts while the model runs on one image, without post-processing. The
heads of a two-stage detector run on the proposals that its first stage keeps.
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
    """Build the model of a config with random weights, in evaluation mode.

    Raises:
        ValueError: if it cannot be built, whatever the libraries raise.
    """
    init_default_scope(config.default_scope)
    registry = import_module(f"{config.default_scope}.registry").MODELS
    try:
        return revert_sync_batchnorm(registry.build(config.model)).eval()
    except Exception as error:  # an unknown type or argument, a value that does not fit
        raise ValueError(f"cannot build the model of this config: {cut(said(error))}") from error


def count(config: Config, height: int, width: int) -> dict[str, Any]:
    """Count parameters and FLOPs.

    Args:
        config: from :func:`hatnet_dense.config.load_config`.
        height: height of the image in pixels.
        width: width of the image in pixels.

    Returns:
        ``params``, ``flops_paper`` and ``flops_complete`` of the model; the same of its backbone, with the prefix
        ``backbone_``; ``uncounted_ops``, the operators that neither convention counts. Most of these are elementwise;
        MMCV's own operators, such as deformable attention, are among them.

    Raises:
        ValueError: if the model cannot be built or run on such an image.
    """
    module = traceable(config)
    model: Any = module.model
    analysis = FlopAnalyzer(module, torch.zeros(1, 3, height, width))
    analysis.set_op_handle(**HANDLES)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # from the tracer, about shapes in the libraries
        try:
            whole, backbone = analysis.by_operator("model"), analysis.by_operator("model.backbone")
        except RuntimeError as error:  # out of memory, or maps too small for a layer
            raise ValueError(f"cannot run this model on {height}×{width}: {said(error)}") from error
    return {
        "params": _params(model),
        **_conventions("flops", whole),
        "backbone_params": _params(model.backbone),
        **_conventions("backbone_flops", backbone),
        "uncounted_ops": sorted(analysis.unsupported_ops("model")),
    }


def traceable(config: Config) -> nn.Module:
    """Wrap the model of a config for tracers: images [B, 3, H, W] → a tuple of tensors; ``model`` is the original.

    The random weights have a fixed seed, because the proposals of a two-stage detector depend on them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = build_model(config)
    return _Tensors(model, config.default_scope)


class _Tensors(nn.Module):
    """A model from tensors to tensors."""

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
