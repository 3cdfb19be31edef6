"""The named recipes: values of :class:`TrainConfig` from the paper, from DeiT where the paper says "as DeiT", or ours.

A field that a recipe does not name has the class's default. The fields' sources are in ``config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hatnet_train.config import FIELDS, RELEASED, TrainConfig, field_help
from hatnet_train.fields import FieldError

DROP_PATH_RATES = {"hatnet_tiny": 0.1, "hatnet_small": 0.1, "hatnet_medium": 0.3, "hatnet_large": 0.3}
"""Stochastic depth by variant, our choice: that of PVTv2-B1 to B4, which have these sizes; the paper gives none."""

IMAGENET: dict[str, Any] = {
    # Sec. 4.1: 8 GPUs with 128 images each, learning rate 1e-3, 300 epochs, AdamW, weight decay 0.05, cosine, random
    # crops, flips, mixup, label smoothing, "the same training protocol as DeiT"; DeiT has the rest
    "variant": "hatnet_small",
    "image_size": 224,
    "epochs": 300,
    "batch_size": 1024,
    "lr": 1e-3,
    "lr_batch_size": 1024,  # DeiT scales linearly, from 5e-4 at 512
    "min_lr": 1e-5,
    "warmup_epochs": 5.0,
    "ema_decay": 0.99996,
    "min_scale": 0.08,
    "hflip": 0.5,
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "random_erasing": 0.25,
    "repeats": 3,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
}

ABLATION: dict[str, Any] = {**IMAGENET, "epochs": 100, "batch_size": 512}
"""Sec. 4.1 and 4.4: 100 epochs, batch halved, and with it the learning rate, which ``lr_batch_size`` scales."""

FINETUNE: dict[str, Any] = {
    # Ours, for photographs and released weights: a random crop of half of the area at least, flips, a mild policy. The
    # gradients are clipped because small batches at the peak rate were unstable (see digits).
    "variant": "hatnet_small",
    "init": RELEASED,
    "image_size": 224,
    "held_out": 0.2,
    "lr": 3e-4,
    "min_lr": 1e-6,
    "layer_decay": 0.8,
    "clip_grad": 1.0,
    "min_scale": 0.5,
    "hflip": 0.5,
    "rand_augment": "rand-m5-n2-mstd0.5-inc1",
    "label_smoothing": 0.1,
}

BY_IMAGES = ((500, 8, 50), (2_000, 16, 40), (10_000, 32, 30), (50_000, 64, 20), (10**9, 128, 15))
"""Batch size and epochs of the recipe finetune up to a number of training images, our choice: 600 steps for 100
images, 15,600 for 50,000."""


def by_images(images: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the recipe finetune that follow the number of training images.

    The warm-up is a tenth of the epochs, the moving average is over a twentieth of the steps, and a run ends after a
    quarter of the epochs without a better one. A batch is at most a quarter of the images.

    Args:
        images: number of training images.
        given: values that were chosen, by field name; the others follow them.
    """
    _, batch_size, epochs = next(row for row in BY_IMAGES if images <= row[0])
    batch_size = given.get("batch_size") or min(batch_size, 2 ** max(0, (images // 4).bit_length() - 1))
    epochs = given.get("epochs") or epochs
    steps = max(1, images // batch_size) * epochs
    steps = min(steps, given.get("max_steps") or steps)
    fresh = given.get("init", FINETUNE["init"]) in ("", "none")
    return {
        "batch_size": batch_size,
        "epochs": epochs,
        "warmup_epochs": epochs / 10,
        "early_stopping": max(3, epochs // 4),
        "ema_decay": round(1 - 1 / max(10, steps / 20), 5),
        **({"layer_decay": 1.0} if fresh else {}),  # there is nothing in lower layers to keep
    }


RECIPES: dict[str, dict[str, Any]] = {
    "finetune": {**FINETUNE, **by_images(1_000, {})},
    # One cycle: a third of the epochs up, the rest down. Without dropout and stochastic depth, so that the losses
    # do not depend on the number of processes. Peak rates from 3e-4 on were unstable.
    "digits": {
        "data": "digits",
        "variant": "hatnet_tiny",
        "image_size": 32,
        "drop_path_rate": 0.0,
        "drop_rate": 0.0,
        "epochs": 7,
        "warmup_epochs": 2.1,
        "batch_size": 32,
        "lr": 1e-4,
        "min_scale": 1.0,
        "max_shift": 2,
        "crop_fraction": 1.0,
        "precision": "fp32",
        "workers": 0,
    },
    "imagenet": IMAGENET,
    "ablation": ABLATION,
    # Table 5, the rows in its order
    "window-ablation-1": {**ABLATION, "variant": "hatnet_small_window234"},
    "window-ablation-2": {**ABLATION, "variant": "hatnet_small_window34"},
    "window-ablation-3": {**ABLATION, "variant": "hatnet_small_window4"},
    "window-ablation-4": ABLATION,
    # Sec. 4.4
    "no-depthwise": {**ABLATION, "variant": "hatnet_small_no_depthwise"},
    "gelu": {**IMAGENET, "variant": "hatnet_small_gelu"},  # "when trained for 300 epochs"
    # The paper has no model of 384 pixels. Schedule and rates are those of DeiT's fine-tuning; grids of 8 because they
    # divide the maps of 96, 48 and 24 positions, our choice.
    "finetune-384": {
        **IMAGENET,
        "image_size": 384,
        "grid_sizes": (8, 8, 8),
        "epochs": 30,
        "batch_size": 512,
        "lr": 5e-6,
        "lr_batch_size": 512,
        "min_lr": 5e-6,
        "weight_decay": 1e-8,
    },
}
"""Values of :class:`TrainConfig` by recipe name."""

NEEDED = {"finetune-384": ("data", "init")}
"""Fields that must be given with a recipe; with those not named here, ``data`` if the recipe has none."""


def build_config(recipe: str, overrides: dict[str, Any], *, images: int = 1_000) -> TrainConfig:
    """Build the configuration of ``recipe`` with ``overrides`` over it.

    Args:
        recipe: its name.
        overrides: values by field name.
        images: number of training images, for the recipe finetune; see :func:`by_images`.

    ``warmup_epochs`` keeps its share of ``epochs`` when only ``epochs`` is overridden, and ``drop_path_rate`` is that
    of the variant in :data:`DROP_PATH_RATES` if neither gives it.

    Raises:
        ValueError: if the recipe is unknown (the known ones are listed), lacks a value, or one is out of range.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; known recipes: {', '.join(RECIPES)}")
    overrides = {name: FIELDS[name].checked(name, v) if name in FIELDS else v for name, v in overrides.items()}
    values = {**recipe_values(recipe, overrides.get("variant")), **overrides}
    for name in NEEDED.get(recipe, ("data",)):
        if not values.get(name):
            raise FieldError(name, f"is required by the recipe {recipe}: {field_help(name)}")
    if recipe == "finetune":
        values = {**values, **by_images(images, overrides), **overrides}
    elif "epochs" in overrides and "warmup_epochs" not in overrides:
        values["warmup_epochs"] *= overrides["epochs"] / RECIPES[recipe]["epochs"]
    return TrainConfig.from_dict(values)


def recipe_values(recipe: str, variant: str | None = None) -> dict[str, Any]:
    """Values of a recipe, with the ``drop_path_rate`` of its variant, or of another one, where it gives none."""
    values = RECIPES[recipe]
    return {"drop_path_rate": _drop_path_rate(variant or values["variant"]), **values}


def _drop_path_rate(variant: str) -> float:
    """Return the rate of the model of Table 1 that ``variant`` is or ablates; 0 if it is unknown."""
    return next((rate for name, rate in DROP_PATH_RATES.items() if variant.startswith(name)), 0.0)
