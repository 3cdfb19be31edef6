"""A trained checkpoint as a classifier: the model, and what images and classes it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from msgspec import Meta
from torch import Tensor

from hatnet_core import HATNet
from hatnet_core.checkpoint import SIZE, find_metadata, load_model
from hatnet_train.config import ImageSize, Share
from hatnet_train.data.augment import MEAN, STD, centre_crop, normalise
from hatnet_train.records import convert

Scale: TypeAlias = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Description:
    """Classes and preprocessing of images as a checkpoint of hatnet-train records them.

    Attributes:
        classes: their names.
        image_size: side of the square input in pixels.
        crop_fraction: share of the short side that the centre crop takes.
        mean: of the normalisation, for values in [0, 1].
        std: of the normalisation.
    """

    classes: Annotated[list[str], Meta(min_length=1)]
    image_size: ImageSize
    crop_fraction: Share
    mean: tuple[float, float, float]
    std: tuple[Scale, Scale, Scale]


@dataclass(frozen=True)
class Classifier(Description):
    """A model with its preprocessing.

    Attributes:
        model: in evaluation mode.
        named: whether the checkpoint names the classes; else ``classes`` are numbers.
    """

    model: HATNet
    named: bool

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
        description = Description([str(i) for i in range(model.num_classes)], SIZE, 0.875, MEAN, STD)
    else:
        description = convert(record, Description, checkpoint)
        if len(description.classes) != model.num_classes:
            raise ValueError(
                f"{checkpoint}: classes must be {model.num_classes} names, as many as the model has outputs, "
                f"got {len(description.classes)}"
            )
    return Classifier(model=model.eval(), named=variant is None, **vars(description))
