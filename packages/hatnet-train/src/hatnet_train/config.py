"""What a run is: :class:`TrainConfig` and the named recipes that fill it.

Every field can be given on the command line under its own name (``batch_size`` as ``--batch-size``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hatnet_core import list_models
from hatnet_core.model import MIN_SIZE

MAX_SIZE = 2048
"""Largest ``image_size`` in pixels, our choice: a slip of the hand should not take all memory."""


def _described(help_text: str, default: Any = dataclasses.MISSING) -> Any:
    """A field with its documentation; without a default, every recipe gives the value."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete: equal configurations on equal machines give equal losses.

    Each field's ``metadata["help"]`` is its documentation, shown by ``hatnet-train --help``.

    Raises:
        ValueError: naming the field, its value and what was expected.
    """

    variant: str = _described(f"model to train: {', '.join(list_models())}")
    image_size: int = _described("side of the square input in pixels, from 32 up")
    epochs: int = _described("passes over the training images")
    batch_size: int = _described("images an optimizer step, over all processes together")
    lr: float = _described("peak learning rate")
    warmup_epochs: float = _described("epochs of linear warm-up to the peak; a cosine leads to zero after it")
    weight_decay: float = _described("AdamW weight decay (Sec. 4.1), not on biases and norms", 0.05)
    label_smoothing: float = _described("label smoothing of the training loss, in [0, 1)", 0.0)
    drop_path_rate: float = _described("stochastic depth of the last block, in [0, 1)", 0.0)
    max_shift: int = _described("augmentation: random shift of up to so many pixels each way")
    seed: int = _described("seed of the weights, the order of the images and their augmentation", 0)

    def __post_init__(self) -> None:
        """Check every field; the command line has given the types."""
        checks = {
            "variant": (self.variant in list_models(), f"one of {', '.join(list_models())}"),
            "image_size": (MIN_SIZE <= self.image_size <= MAX_SIZE, f"from {MIN_SIZE} to {MAX_SIZE} pixels"),
            "epochs": (1 <= self.epochs <= 10**6, "from 1 to 1000000"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (0 < self.lr < float("inf"), "positive"),
            "warmup_epochs": (0 <= self.warmup_epochs < self.epochs, f"from 0 to below epochs={self.epochs}"),
            "weight_decay": (0 <= self.weight_decay < float("inf"), "0 or positive"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "drop_path_rate": (0 <= self.drop_path_rate < 1, "in [0, 1)"),
            "max_shift": (0 <= self.max_shift < self.image_size, f"from 0 to below image_size={self.image_size}"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
        }
        for name, (holds, expected) in checks.items():
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")


RECIPES: dict[str, dict[str, Any]] = {
    # One cycle: a third of the epochs up, the rest down. Without dropout and stochastic depth, so that the losses
    # do not depend on the number of processes. Peak rates from 3e-4 on were unstable.
    "digits": {
        "variant": "hatnet_tiny",
        "image_size": 32,
        "epochs": 7,
        "warmup_epochs": 2.1,
        "batch_size": 32,
        "lr": 1e-4,
        "max_shift": 2,
    },
}
"""Values of :class:`TrainConfig` by recipe name; a field that a recipe does not name has the class's default."""


def build_config(recipe: str, overrides: dict[str, Any]) -> TrainConfig:
    """The configuration of ``recipe`` with ``overrides`` over it.

    ``warmup_epochs`` keeps its share of ``epochs`` when only ``epochs`` is overridden.

    Raises:
        ValueError: if the recipe is unknown (the known ones are listed) or a value is out of range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; known recipes: {', '.join(RECIPES)}")
    values = RECIPES[recipe]
    if "epochs" in overrides and "warmup_epochs" not in overrides:
        overrides = {**overrides, "warmup_epochs": values["warmup_epochs"] * overrides["epochs"] / values["epochs"]}
    return TrainConfig(**{**values, **overrides})
