"""Read the inputs of attention maps: an image file, and a model with the normalisation of its images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hatnet_core import HATNet, create_model
from hatnet_core.checkpoint import load_model, read_checkpoint
from hatnet_core.images import to_rgb

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, for checkpoints without their own."""

RANDOM = "Random weights"
"""How the description of an untrained model begins."""

MAX_PIXELS = 2**26
"""Largest image that is read, in pixels."""


def read_model(
    checkpoint: Path | None, variant: str | None, *, pretrained: bool = False
) -> tuple[HATNet, tuple[Sequence[float], Sequence[float]]]:
    """Load a model in evaluation mode, with mean and standard deviation of its three channels.

    Args:
        checkpoint: a file or folder of hatnet-train, or, together with ``variant``, any that
            :func:`hatnet_core.load_checkpoint` reads; None for random weights, the same every time.
        variant: name from :func:`hatnet_core.list_models`, for checkpoints that do not record it.
        pretrained: download the released weights of ``variant``; without a checkpoint only.

    Raises:
        ValueError: if neither names the model, the checkpoint is not readable, is of another model or lacks a mean and
            standard deviation of three channels, or the model takes no RGB images or attends in windows.
        FileNotFoundError: if the checkpoint is missing.
        ImportError: if the checkpoint is a safetensors file and safetensors is not installed.
        OSError: if the released weights cannot be downloaded.
    """
    if checkpoint is None:
        if variant is None:
            raise ValueError("--checkpoint or --variant must be given; --variant alone has random weights")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = create_model(variant, pretrained=pretrained)
        return _drawable(model, variant), (MEAN, STD)
    content = read_checkpoint(checkpoint)
    model, record = _drawable(load_model(content, variant), str(checkpoint)), content.metadata
    return model, (_channels(record, "mean", MEAN, checkpoint), _channels(record, "std", STD, checkpoint))


def describe_weights(checkpoint: Path | None, variant: str | None, *, pretrained: bool = False) -> str:
    """Name the weights of :func:`read_model` in a line, for a picture; untrained ones with a warning."""
    if checkpoint is not None:
        return f"Weights of {checkpoint}"
    if pretrained:
        return f"Released weights of {variant}, trained on ImageNet"
    return f"{RANDOM} of {variant}: an untrained model, whose attention says nothing about the image"


def _drawable(model: HATNet, origin: str) -> HATNet:
    """Return ``model`` in evaluation mode; raise a ValueError if its attention cannot be drawn."""
    if model.config["in_chans"] != 3:
        raise ValueError(f"{origin}: in_chans must be 3, for RGB images, got {model.config['in_chans']}")
    if "window" in model.config["attention"]:
        stage = 2 + model.config["attention"].index("window")
        raise ValueError(f"{origin}: attention of stage {stage} must be H-MHSA, got windows")
    return model.eval()


def _channels(record: dict[str, Any], name: str, default: Sequence[float], checkpoint: Path) -> Sequence[float]:
    values = record.get(name, default)
    lowest = -math.inf if name == "mean" else 0
    if not (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(value, int | float) and lowest < value < math.inf for value in values)
    ):
        kind = "three numbers" if name == "mean" else "three positive numbers"
        raise ValueError(f"{checkpoint}: {name} must be {kind}, one per channel, got {values!r}")
    return values


def read_image(path: Path) -> Image.Image:
    """Read an image file as hatnet-train does, by :func:`hatnet_core.images.to_rgb`.

    Raises:
        ValueError: if Pillow cannot read it, it exceeds ``MAX_PIXELS``, or its values have no known range.
        FileNotFoundError: if the file is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: must be an existing image file")
    try:
        with Image.open(path) as image:
            if image.width * image.height <= MAX_PIXELS:
                return to_rgb(image)
    except Exception as error:  # a damaged file makes a decoder raise anything
        raise ValueError(f"{path}: not a readable image: {error}") from error
    raise ValueError(f"{path}: must have at most {MAX_PIXELS} pixels, got {image.width}×{image.height}")


def to_input(image: Image.Image, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale an image to ``size`` (height, width) and normalise it; [1, 3, H, W]."""
    scaled = image.resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
    x = pixels.reshape(*size, 3).permute(2, 0, 1) / 255
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]
