"""Options of a training run: every field with its type, range, meaning and source. The recipes are in ``recipes.py``.

A field is declared here and nowhere else. Its annotation is its type and range, the docstring under it its help, and
:data:`MAY_CHANGE` marks what a resumed run may choose anew. The command line (``batch_size`` is ``--batch-size``),
``config.json``, the checks and the page of the documentation derive from that. This module does not import torch.

``Sec.`` is a section of the paper, ``DeiT`` the training that Sec. 4.1 refers to.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_type_hints

from msgspec import Meta

from hatnet_core.config import KERNELS
from hatnet_core.variants import MIN_SIZE, list_models
from hatnet_train.fields import LARGEST, Field, FieldError
from hatnet_train.records import Count

MAX_SIZE = 2048
"""Largest ``image_size`` in pixels, our choice: a typing error should not take all memory."""

MAX_WORKERS = 1024

SHARD_MEGABYTES = 256.0
"""Size of a shard of hatnet-shards. ImageNet's 140 GB become 560 shards: enough for many processes to write and for
sequential readers to divide, few enough to have half of them open at once, and a damaged one is soon copied again."""

QUALITY = 90
"""Quality of the JPEG files that hatnet-shards makes when it resizes, 1 to 100."""

RELEASED = "released"
"""Value of ``init`` for the weights that the paper's authors released (a folder of that name: ./released)."""

MAY_CHANGE = Meta(extra={"may_change": True})
"""Marks a field that a resumed run may choose anew: it decides how the run is computed, not what."""

MAY_GROW = Meta(extra={"may_grow": True})
"""Marks a field that a resumed run may increase, to become longer."""

Positive: TypeAlias = Annotated[int, Meta(ge=1)]
Amount: TypeAlias = Annotated[float, Meta(ge=0, le=LARGEST)]
Probability: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Fraction: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]
Share: TypeAlias = Annotated[float, Meta(gt=0, le=1)]
ImageSize: TypeAlias = Annotated[int, Meta(ge=MIN_SIZE, le=MAX_SIZE)]
Triple: TypeAlias = tuple[Positive, Positive, Positive]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options of the model (Table 1)."""

    variant: str
    """Model: hatnet_tiny, hatnet_small, hatnet_medium, hatnet_large, or an ablation of the paper."""

    grid_sizes: Triple | None = None
    """G1 of stages 2-4 (Sec. 3.2); by default that of the variant."""

    pool_sizes: Triple | None = None
    """G2 of stages 2-4 (Sec. 3.2); by default that of the variant."""

    drop_path_rate: Fraction
    """Stochastic depth of the last block, in [0, 1)."""

    drop_rate: Fraction = 0.2
    """Dropout before the classifier, in [0, 1); 0.2 in the released model."""

    init: Annotated[str, MAY_CHANGE] = ""
    """Weights to start from: released, a file, a run folder, a folder of the Hub, or none; a head of another size is
    dropped."""

    freeze: Literal["none", "backbone"] = "none"
    """Weights that are not trained: none, or all but the classifier (backbone)."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Options of the data set and its loading."""

    data: Annotated[str, MAY_CHANGE, Meta(min_length=1)]
    """ImageNet-layout folder, folder of classes, folder of shards, digits or synthetic (a folder of that name:
    ./digits)."""

    labels: Annotated[str, MAY_CHANGE] = ""
    """CSV file with the columns file (below data), label and, if wanted, split; by default folders are classes."""

    held_out: Fraction = 0.0
    """Share of the training images to hold out, by class and seed, in [0, 1), of data without val/, validation/ or
    test/."""

    image_size: ImageSize
    """Side of the square input in pixels, from 32 (Sec. 4.1: 224)."""

    crop_fraction: Share = 0.875
    """Evaluation: fraction of the short side that the centre crop takes, in (0, 1] (DeiT)."""

    workers: Annotated[int, MAY_CHANGE, Meta(ge=0, le=MAX_WORKERS)] = 4
    """Data workers per process; with 0, the process loads its own data."""


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """Options that change training images only."""

    min_scale: Share
    """Smallest area of a random crop, in (0, 1] (timm: 0.08); 1 takes the centre square."""

    max_shift: Count = 0
    """Largest random shift of the centre square in pixels; 0 with random crops."""

    hflip: Probability = 0.0
    """Probability of a horizontal flip (Sec. 4.1, DeiT: 0.5)."""

    rand_augment: str = ""
    """RandAugment policy of timm (DeiT: rand-m9-mstd0.5-inc1); empty disables it."""

    random_erasing: Probability = 0.0
    """Probability of erasing a rectangle (DeiT: 0.25)."""

    repeats: Positive = 1
    """Repeated augmentation: how often an epoch uses each image that it samples (DeiT: 3)."""

    mixup: Amount = 0.0
    """Alpha of mixup (Sec. 4.1, DeiT: 0.8); 0 disables it."""

    cutmix: Amount = 0.0
    """Alpha of CutMix (DeiT: 1); 0 disables it. With mixup, each pair gets one of the two."""

    label_smoothing: Fraction = 0.0
    """Label smoothing of the training loss, in [0, 1) (Sec. 4.1, DeiT: 0.1)."""


@dataclass(frozen=True, kw_only=True)
class OptimisationOptions:
    """Options of AdamW and its schedule (Sec. 4.1)."""

    epochs: Annotated[int, Meta(ge=1, le=10**6), MAY_GROW]
    """Passes over the training images (Sec. 4.1: 300)."""

    max_steps: Annotated[int, Meta(ge=0), MAY_GROW] = 0
    """Optimizer steps at most, with the schedule over so many; 0 takes all of the epochs."""

    early_stopping: Annotated[int, MAY_CHANGE, Meta(ge=0)] = 0
    """Epochs without a better held-out accuracy after which the run ends; 0 takes all epochs."""

    batch_size: Positive
    """Images per optimizer step, over all processes (Sec. 4.1: 8 x 128)."""

    lr: Annotated[float, Meta(gt=0, le=LARGEST)]
    """Peak learning rate at a batch of lr_batch_size (Sec. 4.1)."""

    lr_batch_size: Count = 0
    """Reference batch size for linear learning rate scaling (DeiT); 0 disables it."""

    min_lr: Amount = 0.0
    """Learning rate at the end of the cosine, scaled as lr is (DeiT: 1e-5)."""

    warmup_epochs: Amount
    """Epochs of linear warm-up to the peak, before the cosine (DeiT: 5)."""

    weight_decay: Amount = 0.05
    """Weight decay of AdamW (Sec. 4.1), not on biases and norms (DeiT)."""

    layer_decay: Share = 1.0
    """Factor from the learning rate of a block to that of the one below it, in (0, 1]; 1: the same rate for all."""

    clip_grad: Amount = 0.0
    """Largest norm of the gradients; 0 does not clip (DeiT)."""

    ema_decay: Fraction = 0.0
    """Decay of the moving average of the weights (DeiT: 0.99996); 0 keeps none."""

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    """Seed of the weights, the order of the images and their augmentation."""


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """Options of precision and sharding."""

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast to bf16 or fp16 with weights in fp32; or fp32; auto: bf16 where the device has it."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], MAY_CHANGE] = 0
    """ZeRO stage of DeepSpeed: the processes divide nothing (0), optimizer states (1), gradients (2), weights (3)."""

    accumulation: Annotated[int, MAY_CHANGE, Meta(ge=1)] = 1
    """Forward and backward passes per optimizer step."""

    activation_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Recompute activations in the backward pass, to save memory."""

    compile: Annotated[bool, MAY_CHANGE] = False
    """Compile the model with torch.compile."""

    kernels: Annotated[str, MAY_CHANGE] = "auto"
    """How the model computes: auto, plain, reference or triton; see hatnet_core.set_kernels."""

    deterministic: Annotated[bool, MAY_CHANGE] = False
    """Use deterministic algorithms only: the same bits in every run, but slower."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Options of saving; the final weights are always saved."""

    checkpoint_steps: Annotated[int, MAY_CHANGE, Meta(ge=0)] = 0
    """Steps from one checkpoint to the next; 0 saves at the end of each epoch."""

    keep_checkpoints: Annotated[int, MAY_CHANGE, Meta(ge=1)] = 2
    """Newest checkpoints to keep, in addition to the best."""


@dataclass(frozen=True, kw_only=True)
class FaultOptions:
    """Options of what a run survives."""

    max_skipped_steps: Annotated[int, MAY_CHANGE, Meta(ge=0)] = 3
    """Steps that may be skipped because loss or gradients are not finite."""

    on_bad_image: Annotated[Literal["strict", "replace"], MAY_CHANGE] = "strict"
    """An image that cannot be read: strict ends the run; replace takes the next one, or skips it in evaluation."""

    max_bad_images: Annotated[int, MAY_CHANGE, Meta(ge=0)] = 100
    """Largest number of such images per epoch."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a run in groups, not checked."""

    model: ModelOptions
    images: ImageOptions
    augmentation: AugmentationOptions
    optimisation: OptimisationOptions
    compute: ComputeOptions
    checkpoints: CheckpointOptions
    faults: FaultOptions

    @classmethod
    def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
        """Make the groups from values by field name, whatever group a field is in.

        Raises:
            FieldError: naming a field that is missing, unknown or out of range.
        """
        kinds = get_type_hints(cls)
        groups: dict[str, dict[str, Any]] = {group: {} for group in kinds}
        for name, value in values.items():
            if name not in FIELDS:
                raise FieldError(name, "is not an option of a run")
            groups[FIELDS[name].group][name] = FIELDS[name].checked(name, value)
        if missing := [name for name, field in FIELDS.items() if field.required and name not in values]:
            raise FieldError(missing[0], f"is missing: {field_help(missing[0])}")
        return cls(**{group: kinds[group](**content) for group, content in groups.items()})

    def to_dict(self) -> dict[str, Any]:
        """Values by field name, without the groups, as in ``config.json``."""
        return {name: getattr(getattr(self, field.group), name) for name, field in FIELDS.items()}


T = TypeVar("T", bound=Options)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Configuration of one training run: equal ones on equal machines give equal losses.

    Raises:
        FieldError: naming the field, its value and what was expected.
    """

    def __post_init__(self) -> None:
        """Check every field alone, then those that depend on others."""
        for name, field in FIELDS.items():
            field.checked(name, getattr(getattr(self, field.group), name))
        optimisation, augmentation, size = self.optimisation, self.augmentation, self.images.image_size
        self._check_name("variant", KNOWN)
        self._check_name("kernels", KERNELS)
        self._check("min_lr", optimisation.min_lr <= optimisation.lr, f"at most lr={optimisation.lr}")
        self._check(
            "warmup_epochs",
            optimisation.warmup_epochs < optimisation.epochs,
            f"below epochs={optimisation.epochs}",
        )
        self._check("max_shift", augmentation.max_shift < size, f"below image_size={size}")
        self._check(
            "max_shift",
            augmentation.max_shift == 0 or augmentation.min_scale == 1,
            f"0 with random crops (min_scale={augmentation.min_scale})",
        )

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise FieldError(name, f"must be {expected}, got {self._value(name)!r}")

    def _check_name(self, name: str, known: Sequence[str]) -> None:
        if self._value(name) not in known:
            similar = difflib.get_close_matches(self._value(name), known, n=1)
            hint = f", did you mean {similar[0]}?" if similar else ""
            raise FieldError(name, f"must be one of {', '.join(known)}, got {self._value(name)!r}{hint}")

    def _value(self, name: str) -> Any:
        return getattr(getattr(self, FIELDS[name].group), name)

    def replace(self, **changes: Any) -> TrainConfig:
        """Copy with other values of some fields, by name."""
        return TrainConfig.from_dict({**self.to_dict(), **changes})

    @property
    def peak_lr(self) -> float:
        """Peak learning rate of this batch size: ``lr``, scaled linearly if ``lr_batch_size`` is given."""
        options = self.optimisation
        return options.lr * options.batch_size / options.lr_batch_size if options.lr_batch_size else options.lr

    @property
    def initial_weights(self) -> str:
        """``init``, empty for fresh weights."""
        return "" if self.model.init == "none" else self.model.init

    @property
    def mixes(self) -> bool:
        """True if images are mixed in pairs."""
        return self.augmentation.mixup > 0 or self.augmentation.cutmix > 0


KNOWN = tuple(list_models(ablations=True))


def _fields() -> Iterator[tuple[str, Field]]:
    for group, kind in get_type_hints(Options).items():
        types = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            marks = [
                m.extra for m in getattr(types[field.name], "__metadata__", ()) if isinstance(m, Meta) and m.extra
            ]
            required = field.default is dataclasses.MISSING
            may = {name for mark in marks for name in mark}
            yield field.name, Field(group, types[field.name], required, field.default, frozenset(may))


FIELDS = dict(_fields())
"""Every field of :class:`TrainConfig` by its name, which no two groups share."""


@functools.cache
def field_help(name: str) -> str:
    """Return the docstring under a field."""
    import docstring_parser

    kind = get_type_hints(Options)[FIELDS[name].group]
    documented = {param.arg_name: param.description for param in docstring_parser.parse_from_object(kind).params}
    return documented.get(name) or ""
