"""Values of the recipe finetune that follow the data and the weights: number of images, model, image size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hatnet_core.checkpoint import find_metadata
from hatnet_core.checkpoint.matching import variant_name
from hatnet_train.config import RELEASED, TrainConfig
from hatnet_train.data import Split, open_split
from hatnet_train.fields import FieldError
from hatnet_train.recipes import build_config


def finetune_config(given: Mapping[str, Any]) -> TrainConfig:
    """Build the configuration of a run of the recipe finetune.

    Batch, epochs and what follows them fit the number of training images. Model and image size are those of the
    weights to start from, if these record them.

    Args:
        given: values that were chosen, by field name.

    Raises:
        ValueError: as :func:`hatnet_train.recipes.build_config` does, or about the data or the weights.
    """
    nominal = build_config("finetune", {**given})
    recorded, chosen = _of_weights(nominal.initial_weights), given.get("variant")
    if chosen and recorded.get("variant", chosen) != chosen:
        expected = f"{recorded['variant']}, as {nominal.model.init} records, or omitted"
        raise FieldError("variant", f"must be {expected}, got {chosen!r}")
    values = {**recorded, **given}
    split = Split(nominal.images.labels, nominal.images.held_out, nominal.optimisation.seed)
    training = open_split(nominal.images.data, train=True, size=nominal.images.image_size, split=split)
    return build_config("finetune", values, images=len(training))


def _of_weights(init: str) -> dict[str, Any]:
    """Variant and image size that weights record; empty for released and fresh ones."""
    if init in ("", RELEASED):
        return {}
    record = find_metadata(Path(init))
    stored = record.get("config", {}).items()
    model = {name: tuple(value) if isinstance(value, list) else value for name, value in stored}
    found = {"variant": variant_name(model) if model else None, "image_size": record.get("image_size")}
    return {name: value for name, value in found.items() if value}
