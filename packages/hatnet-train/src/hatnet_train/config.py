"""What a run is: :class:`TrainConfig`, every field with its meaning and source. The recipes are in ``recipes.py``.

Every field can be given on the command line under its own name (``batch_size`` as ``--batch-size``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hatnet_core.commands import SHARED
from hatnet_core.config import KERNELS
from hatnet_core.variants import MIN_SIZE, list_models

MAX_SIZE = 2048
"""Largest ``image_size`` in pixels, our choice: a slip of the hand should not take all memory."""

MAX_WORKERS = 1024

PRECISIONS = ("bf16", "fp16", "fp32")

ZERO_STAGES = (0, 1, 2, 3)

BAD_IMAGE = ("strict", "replace")


SHARD_MEGABYTES = 256.0
"""Size of a shard of hatnet-shards. It makes 560 of ImageNet's 140 GB: enough for many processes to write and for
readers in sequence to share out, few enough to have half of them open at once, and one that is damaged is soon copied
again."""

QUALITY = 90
"""Of the JPEG files that hatnet-shards makes when it resizes."""


def _described(help_text: str, default: Any = dataclasses.MISSING, choices: Sequence[Any] | None = None) -> Any:
    """A field with its documentation; without a default, every recipe gives the value."""
    return field(default=default, metadata={"help": help_text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run, complete: equal configurations on equal machines give equal losses.

    Each field's ``metadata["help"]`` is its documentation, shown by ``hatnet-train --help``; "Sec." is the paper's.

    Raises:
        ValueError: naming the field, its value and what was expected.
    """

    data: str = _described("an ImageNet-layout folder (./digits if that is its name), shards, digits or synthetic")

    variant: str = _described(SHARED["--variant"], choices=list_models(ablations=True))
    image_size: int = _described("side of the square input in pixels, from 32 up (Sec. 4.1: 224)")
    grid_sizes: tuple[int, int, int] | None = _described("G1 of stages 2-4 (default: the variant's)", None)
    pool_sizes: tuple[int, int, int] | None = _described("G2 of stages 2-4 (default: the variant's)", None)
    drop_path_rate: float = _described("stochastic depth of the last block, in [0, 1)")
    drop_rate: float = _described("dropout before the classifier, in [0, 1); the released model has 0.2", 0.2)
    init: str = _described("weights to start from, a file or run folder; a head of another size is left out", "")

    epochs: int = _described("passes over the training images (Sec. 4.1: 300)")
    batch_size: int = _described("images an optimizer step, over all processes together (Sec. 4.1: 8 x 128)")
    lr: float = _described("peak learning rate at a batch of lr_batch_size (Sec. 4.1)")
    lr_batch_size: int = _described("batch for which lr is meant; for others it is scaled linearly (DeiT); 0: not", 0)
    min_lr: float = _described("learning rate at the end of the cosine, scaled as lr is (DeiT: 1e-5)", 0.0)
    warmup_epochs: float = _described("epochs of linear warm-up to the peak; a cosine follows (DeiT: 5)")
    weight_decay: float = _described("AdamW weight decay (Sec. 4.1), not on biases and norms (DeiT)", 0.05)
    clip_grad: float = _described("largest norm of the gradients; 0: not clipped (DeiT)", 0.0)
    ema_decay: float = _described("decay of the moving average of the weights; 0: none (DeiT: 0.99996)", 0.0)

    min_scale: float = _described("smallest area of a random crop, in (0, 1] (timm: 0.08); 1: the centre square")
    max_shift: int = _described("random shift of up to so many pixels each way, of the centre square", 0)
    hflip: float = _described("probability of a horizontal flip (Sec. 4.1, DeiT: 0.5)", 0.0)
    rand_augment: str = _described("timm's RandAugment policy (DeiT: rand-m9-mstd0.5-inc1); empty: none", "")
    random_erasing: float = _described("probability of erasing a rectangle (DeiT: 0.25)", 0.0)
    repeats: int = _described("repeated augmentation: times an image comes in an epoch that sees it (DeiT: 3)", 1)
    mixup: float = _described("alpha of mixup (Sec. 4.1, DeiT: 0.8); 0: none", 0.0)
    cutmix: float = _described("alpha of CutMix (DeiT: 1); 0: none; with mixup, each pair has one of them", 0.0)
    label_smoothing: float = _described("label smoothing of the training loss, in [0, 1) (Sec. 4.1, DeiT: 0.1)", 0.0)
    crop_fraction: float = _described("evaluation: share of the short side that the centre crop takes (DeiT)", 0.875)

    precision: str = _described("bf16 or fp16 through torch's autocast, weights in fp32; or fp32", "bf16", PRECISIONS)
    zero_stage: int = _described("ZeRO stage of DeepSpeed, 0 to 3: what the processes share out", 0, ZERO_STAGES)
    accumulation: int = _described("forward and backward passes an optimizer step", 1)
    activation_checkpointing: bool = _described(
        "compute activations again in the backward pass, to save memory", False
    )
    compile: bool = _described("compile the model with torch.compile", False)
    kernels: str = _described("how the model computes, see hatnet_core.set_kernels", "auto", KERNELS)
    deterministic: bool = _described("use deterministic algorithms only: the same bits on every run, slower", False)
    workers: int = _described("data workers a process; 0: the process itself", 4)
    checkpoint_steps: int = _described("steps from one checkpoint to the next; 0: one at the end of each epoch", 0)
    keep_checkpoints: int = _described("newest checkpoints to keep, beside the best", 2)
    max_skipped_steps: int = _described("steps that may be left out as loss or gradients are not finite", 3)
    on_bad_image: str = _described(
        "strict: an image that cannot be read ends the run; replace: the next one takes its place, held out it is not "
        "counted",
        "strict",
        BAD_IMAGE,
    )
    max_bad_images: int = _described("such images in an epoch; more end the run", 100)
    seed: int = _described("seed of the weights, the order of the images and their augmentation", 0)

    def __post_init__(self) -> None:
        """Check every field; the command line has given the types."""
        for name, (holds, expected) in {**self._model_checks(), **self._run_checks(), **self._data_checks()}.items():
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def peak_lr(self) -> float:
        """Peak learning rate of this batch size: ``lr``, scaled linearly if ``lr_batch_size`` is given."""
        return self.lr * self.batch_size / self.lr_batch_size if self.lr_batch_size else self.lr

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return self.mixup > 0 or self.cutmix > 0

    def _model_checks(self) -> dict[str, tuple[bool, str]]:
        known = list_models(ablations=True)
        return {
            "variant": (self.variant in known, f"one of {', '.join(known)}"),
            "image_size": (MIN_SIZE <= self.image_size <= MAX_SIZE, f"from {MIN_SIZE} to {MAX_SIZE} pixels"),
            "grid_sizes": (self.grid_sizes is None or min(self.grid_sizes) >= 1, "three positive numbers"),
            "pool_sizes": (self.pool_sizes is None or min(self.pool_sizes) >= 1, "three positive numbers"),
            "drop_path_rate": (0 <= self.drop_path_rate < 1, "in [0, 1)"),
            "drop_rate": (0 <= self.drop_rate < 1, "in [0, 1)"),
        }

    def _run_checks(self) -> dict[str, tuple[bool, str]]:
        infinity = float("inf")
        return {
            "epochs": (1 <= self.epochs <= 10**6, "from 1 to 1000000"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "lr": (0 < self.lr < infinity, "positive and finite"),
            "lr_batch_size": (self.lr_batch_size >= 0, "0 or positive"),
            "min_lr": (0 <= self.min_lr <= self.lr, f"from 0 to lr={self.lr}"),
            "warmup_epochs": (0 <= self.warmup_epochs < self.epochs, f"from 0 to below epochs={self.epochs}"),
            "weight_decay": (0 <= self.weight_decay < infinity, "0 or positive"),
            "clip_grad": (0 <= self.clip_grad < infinity, "0 or positive"),
            "ema_decay": (0 <= self.ema_decay < 1, "in [0, 1)"),
            "precision": (self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
            "zero_stage": (self.zero_stage in ZERO_STAGES, "from 0 to 3"),
            "kernels": (self.kernels in KERNELS, f"one of {', '.join(KERNELS)}"),
            "accumulation": (self.accumulation >= 1, "at least 1"),
            "workers": (0 <= self.workers <= MAX_WORKERS, f"from 0 to {MAX_WORKERS}"),
            "checkpoint_steps": (self.checkpoint_steps >= 0, "0 or positive"),
            "keep_checkpoints": (self.keep_checkpoints >= 1, "at least 1"),
            "max_skipped_steps": (self.max_skipped_steps >= 0, "0 or positive"),
            "on_bad_image": (self.on_bad_image in BAD_IMAGE, f"one of {', '.join(BAD_IMAGE)}"),
            "max_bad_images": (self.max_bad_images >= 0, "0 or positive"),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
        }

    def _data_checks(self) -> dict[str, tuple[bool, str]]:
        infinity = float("inf")
        return {
            "data": (bool(self.data), "digits, synthetic or the path of a folder"),
            "min_scale": (0 < self.min_scale <= 1, "in (0, 1]"),
            "max_shift": (
                0 <= self.max_shift < self.image_size and (self.max_shift == 0 or self.min_scale == 1),
                f"from 0 to below image_size={self.image_size}, and 0 with random crops (min_scale below 1)",
            ),
            "hflip": (0 <= self.hflip <= 1, "in [0, 1]"),
            "random_erasing": (0 <= self.random_erasing <= 1, "in [0, 1]"),
            "repeats": (self.repeats >= 1, "at least 1"),
            "mixup": (0 <= self.mixup < infinity, "0 or positive"),
            "cutmix": (0 <= self.cutmix < infinity, "0 or positive"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "crop_fraction": (0 < self.crop_fraction <= 1, "in (0, 1]"),
        }
