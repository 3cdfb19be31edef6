"""A trained checkpoint as a classifier: the model, and what images and classes it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hatnet_core import HATNet, create_model, load_checkpoint, read_metadata
from hatnet_core.checkpoint import build_model, has_metadata, head_size, read_state
from hatnet_core.model import MIN_SIZE
from hatnet_train.data.augment import MEAN, STD, centre_crop, normalise


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode with its preprocessing.

    Attributes:
        model: in evaluation mode.
        classes: their names; the numbers where the checkpoint does not name them.
        named: whether it does.
        image_size: side of the square input in pixels.
        crop_fraction: share of the short side that the centre crop takes.
        mean: of the normalisation, for values in [0, 1].
        std: likewise.
    """

    model: HATNet
    classes: Sequence[str]
    named: bool
    image_size: int
    crop_fraction: float
    mean: Sequence[float]
    std: Sequence[float]

    def preprocess(self, image: Tensor) -> Tensor:
        """From an image [3, H, W] uint8 to the normalised centre crop [3, image_size, image_size] float32."""
        return normalise(centre_crop(image, self.image_size, self.crop_fraction), self.mean, self.std)


def load_classifier(checkpoint: Path, variant: str | None = None) -> Classifier:
    """Read a checkpoint of hatnet-train, or any other of a HAT-Net.

    Args:
        checkpoint: a run folder of hatnet-train, a checkpoint or a ``.safetensors`` of it, or, together with
            ``variant``, any file that :func:`hatnet_core.load_checkpoint` reads, such as the released weights. For
            those, preprocessing is that of the paper: ImageNet's mean and deviation, 224 of 256 pixels.
        variant: the model; for files that do not say what they hold. Those that do must not contradict it.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it cannot be read, does not describe its model, or not how images are preprocessed; if it is of
            another variant.
    """
    described = _record_of(checkpoint) if variant is not None else None
    if described is not None and "image_size" in described:
        if described.get("variant") != variant:
            raise ValueError(f"{checkpoint} holds {described.get('variant')}, got {variant}: leave the variant out")
        variant = None
    if variant is None and not has_metadata(checkpoint):
        if not checkpoint.exists():
            raise FileNotFoundError(f"no checkpoint at {checkpoint}: expected an existing file or folder")
        raise ValueError(f"{checkpoint} does not say which model it holds: name it with --variant")
    if variant is not None:
        state, _ = read_state(checkpoint)
        model = create_model(variant, num_classes=head_size(state))
        record: dict[str, Any] = {"classes": [str(i) for i in range(model.num_classes)], "image_size": 224}
        record |= {"crop_fraction": 0.875, "mean": list(MEAN), "std": list(STD)}
    else:
        record = read_metadata(checkpoint)
        model = build_model(record["config"], checkpoint)
        _check_record(record, model.num_classes, checkpoint)
    load_checkpoint(model, checkpoint)
    return Classifier(
        model=model.eval(),
        classes=record["classes"],
        named=variant is None,
        image_size=record["image_size"],
        crop_fraction=record["crop_fraction"],
        mean=record["mean"],
        std=record["std"],
    )


def _record_of(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, None if nothing."""
    try:
        return read_metadata(checkpoint) if has_metadata(checkpoint) else None
    except ValueError:
        return None


def pick_device(name: str) -> torch.device:
    """The device of a name such as ``cpu`` or ``cuda:1``; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: if torch does not know or have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be auto, cpu, or one that this machine has, got {name}") from error
    return device


def _check_record(record: dict[str, Any], num_classes: int, checkpoint: Path) -> None:
    classes, size, fraction = record.get("classes"), record.get("image_size"), record.get("crop_fraction")
    usable = {
        "classes": isinstance(classes, list) and len(classes) == num_classes > 0,
        "image_size": type(size) is int and size >= MIN_SIZE,
        "crop_fraction": isinstance(fraction, float) and 0 < fraction <= 1,
        "mean": _three_numbers(record.get("mean")),
        "std": _three_numbers(record.get("std")) and min(record["std"]) > 0,
    }
    wrong = [name for name, holds in usable.items() if not holds]
    if wrong:
        raise ValueError(f"{checkpoint} has no usable {', '.join(wrong)}; expected a checkpoint of hatnet-train")


def _three_numbers(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(number, float) for number in value)
