"""A trained checkpoint as a classifier: the model, and what images and classes it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hatnet_core import HATNet
from hatnet_core.checkpoint import SIZE, find_metadata, load_model
from hatnet_core.variants import MIN_SIZE
from hatnet_train.config import MAX_SIZE
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
        ValueError: as :func:`hatnet_core.checkpoint.load_model` does, or if it does not say how images are
            preprocessed, or is of another variant.
    """
    record = find_metadata(checkpoint)
    if variant is not None and "image_size" in record:
        if record.get("variant") != variant:
            raise ValueError(
                f"variant must be {record.get('variant')}, as {checkpoint} says, or omitted, got {variant}"
            )
        variant = None
    model = load_model(checkpoint, variant)
    if model.in_chans != 3:
        raise ValueError(f"{checkpoint} holds a model of in_chans={model.in_chans}; expected 3, for RGB images")
    if variant is not None:
        record = {"classes": [str(i) for i in range(model.num_classes)], "image_size": SIZE}
        record |= {"crop_fraction": 0.875, "mean": list(MEAN), "std": list(STD)}
    else:
        _check_record(record, model.num_classes, checkpoint)
    return Classifier(
        model=model.eval(),
        classes=record["classes"],
        named=variant is None,
        image_size=record["image_size"],
        crop_fraction=record["crop_fraction"],
        mean=record["mean"],
        std=record["std"],
    )


def _check_record(record: dict[str, Any], num_classes: int, checkpoint: Path) -> None:
    classes, size, fraction = record.get("classes"), record.get("image_size"), record.get("crop_fraction")
    usable = {
        "classes": isinstance(classes, list) and len(classes) == num_classes > 0,
        "image_size": type(size) is int and MIN_SIZE <= size <= MAX_SIZE,
        "crop_fraction": isinstance(fraction, float) and 0 < fraction <= 1,
        "mean": _three_numbers(record.get("mean")),
        "std": _three_numbers(record.get("std")) and min(record["std"]) > 0,
    }
    wrong = [name for name, holds in usable.items() if not holds]
    if wrong:
        raise ValueError(f"{checkpoint} has no usable {', '.join(wrong)}; expected a checkpoint of hatnet-train")


def _three_numbers(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(number, float) for number in value)
