"""What attention maps are made from: an image file, and a model with the normalisation of its images."""

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
"""ImageNet's, for checkpoints that do not name their own."""

MAX_PIXELS = 2**26
"""Largest image that is read, in pixels."""


def read_model(checkpoint: Path | None, variant: str | None) -> tuple[HATNet, tuple[Sequence[float], Sequence[float]]]:
    """The model of a checkpoint and how its images are normalised.

    Args:
        checkpoint: a file or folder of hatnet-train, or, together with ``variant``, any that
            :func:`hatnet_core.load_checkpoint` reads; None for random weights, the same every time.
        variant: of :func:`hatnet_core.list_models`, for checkpoints that do not say what they hold.

    Returns:
        The model in evaluation mode, and mean and standard deviation of its three channels.

    Raises:
        ValueError: if neither says which model it is, the checkpoint cannot be read, is of another model or holds no
            mean and standard deviation of three channels, or the model takes no RGB images or attends in windows.
        FileNotFoundError: if there is no such checkpoint.
        ImportError: if the checkpoint is a safetensors file and safetensors is not installed.
    """
    if checkpoint is None:
        if variant is None:
            raise ValueError("expected --checkpoint, or --variant for a model with random weights")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = create_model(variant)
        return _drawable(model, variant), (MEAN, STD)
    content = read_checkpoint(checkpoint)
    model, record = _drawable(load_model(content, variant), str(checkpoint)), content.metadata
    return model, (_channels(record, "mean", MEAN, checkpoint), _channels(record, "std", STD, checkpoint))


def _drawable(model: HATNet, origin: str) -> HATNet:
    """``model`` in evaluation mode; ValueError if it is not one whose attention is drawn here."""
    if model.config["in_chans"] != 3:
        raise ValueError(f"{origin} holds a model of in_chans={model.config['in_chans']}; expected 3, for RGB images")
    if "window" in model.config["attention"]:
        stage = 2 + model.config["attention"].index("window")
        raise ValueError(f"{origin} attends in windows in stage {stage}; expected H-MHSA in stages 2-4")
    return model.eval()


def _channels(record: dict[str, Any], name: str, default: Sequence[float], checkpoint: Path) -> Sequence[float]:
    values = record.get(name, default)
    lowest = -math.inf if name == "mean" else 0
    if not (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(value, int | float) and lowest < value < math.inf for value in values)
    ):
        what = "three numbers" if name == "mean" else "three positive numbers"
        raise ValueError(f"{checkpoint} holds {name}={values!r}; expected {what}, one for each of its channels")
    return values


def read_image(path: Path) -> Image.Image:
    """An image file as :func:`hatnet_core.images.to_rgb` reads it: what hatnet-train classifies, too.

    Raises:
        ValueError: if it is no image that Pillow reads, beyond ``MAX_PIXELS``, or of numbers without a known range.
        FileNotFoundError: if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}: expected an existing image file")
    try:
        with Image.open(path) as image:
            if image.width * image.height <= MAX_PIXELS:
                return to_rgb(image)
    except Exception as error:  # a damaged file makes a decoder raise anything
        raise ValueError(f"{path} is not a readable image: {error}") from error
    raise ValueError(f"{path} is {image.width}×{image.height}: expected at most {MAX_PIXELS} pixels")


def to_input(image: Image.Image, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An image scaled to ``size`` (height, width) and normalised, [1, 3, H, W]."""
    scaled = image.resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(scaled.tobytes()), dtype=torch.uint8)
    x = pixels.reshape(*size, 3).permute(2, 0, 1) / 255
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]
