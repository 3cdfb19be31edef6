"""Arguments of the model (Table 1, Sec. 4.4): the only place that declares, checks and describes them.

:class:`HATNet` takes the fields of :class:`HATNetConfig` and keeps them as ``model.config``. Checkpoints, the hub and
the configuration of transformers derive from them. To add an argument, add a field, check it in ``__post_init__`` and
use it in ``model.py``. This module does not import torch.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

ATTENTIONS = ("hierarchical", "window")
"""Attentions of stages 2-4: H-MHSA, or Swin's shifted windows, the comparison of Table 5."""

ACTIVATION_NAMES = ("silu", "gelu")
"""The paper's SiLU, or GELU, the comparison of Sec. 4.4."""

KERNELS = ("auto", "plain", "reference", "triton")
"""How models compute; see :func:`hatnet_core.set_kernels`. Not an argument of the model: it changes no result."""

_TRAINED = {"trained": True}


@dataclass(eq=False)
class HATNetConfig(Mapping[str, Any]):
    """Arguments of :class:`hatnet_core.HATNet`, as attributes and as a mapping.

    ``embed_dims``, ``depths``, ``kernel_sizes`` and ``mlp_ratios`` have one entry for each of the paper's stages 2-5.
    ``grid_sizes``, ``pool_sizes`` and ``attention`` have one for each of stages 2-4, because stage 5 is plain MHSA.
    ``HATNet(**config)`` builds the model. The fields cannot be assigned. Any other attribute can, as
    ``transformers.Trainer`` does; it is neither part of the mapping nor saved.

    Raises:
        ValueError: naming the argument and its value, if it is out of range.

    Example:
        >>> config = HATNetConfig(embed_dims=(48, 96, 240, 384), depths=(2, 2, 6, 3), head_dim=48)
        >>> config.num_classes, config["grid_sizes"]
        (1000, (8, 7, 7))
    """

    embed_dims: Sequence[int] = field(metadata=_TRAINED)
    """C of each stage; divisible by ``head_dim``."""

    depths: Sequence[int] = field(metadata=_TRAINED)
    """Number of blocks of each stage."""

    head_dim: int = field(default=64, metadata=_TRAINED)
    """Channels of one attention head."""

    kernel_sizes: Sequence[int] = field(default=(3, 3, 3, 3), metadata=_TRAINED)
    """K, side of the depthwise kernel of each stage; odd."""

    mlp_ratios: Sequence[int] = field(default=(8, 8, 4, 4), metadata=_TRAINED)
    """E, expansion ratio of each stage."""

    grid_sizes: Sequence[int] = (8, 7, 7)
    """G1, side of the local attention grids."""

    pool_sizes: Sequence[int] = (8, 4, 2)
    """G2, pooling of keys and values in the global attention."""

    attention: Sequence[str] = field(default=("hierarchical",) * 3, metadata=_TRAINED)
    """``hierarchical``, or ``window`` for Swin's windows of 7×7, shifted in every second block (Table 5).

    A window stage ignores G1 and G2.
    """

    activation: str = field(default="silu", metadata=_TRAINED)
    """``silu``, or ``gelu`` (Sec. 4.4), in stem and MLPs."""

    depthwise: bool = field(default=True, metadata=_TRAINED)
    """Use a depthwise convolution in the MLPs; without it, the pure transformer of Sec. 4.4."""

    in_chans: int = 3
    """Channels of the input image."""

    num_classes: int = 1000
    """Outputs of the linear head; 0 returns the pooled features."""

    global_pool: str = "avg"
    """``avg``, or an empty string for feature maps without pooling, which needs ``num_classes=0``."""

    drop_rate: float = 0.2
    """Dropout before the linear layer of the head."""

    proj_drop_rate: float = 0.0
    """Channel dropout at the end of attention and MLP."""

    drop_path_rate: float = 0.0
    """Stochastic depth of the last block; rises linearly from 0 at the first."""

    def __post_init__(self) -> None:
        """Check every field; convert sequences to tuples and integers of NumPy to ``int``."""
        # vars(), because __setattr__ refuses to assign fields
        vars(self).update(
            embed_dims=positive_ints("embed_dims", self.embed_dims, 4),
            depths=positive_ints("depths", self.depths, 4),
            head_dim=positive_int("head_dim", self.head_dim),
            kernel_sizes=positive_ints("kernel_sizes", self.kernel_sizes, 4),
            mlp_ratios=positive_ints("mlp_ratios", self.mlp_ratios, 4),
            grid_sizes=positive_ints("grid_sizes", self.grid_sizes, 3),
            pool_sizes=positive_ints("pool_sizes", self.pool_sizes, 3),
            attention=_attention(self.attention),
            activation=_one_of("activation", self.activation, ACTIVATION_NAMES),
            depthwise=_flag("depthwise", self.depthwise),
            in_chans=positive_int("in_chans", self.in_chans),
            num_classes=positive_int("num_classes", self.num_classes, lowest=0),
            global_pool=_global_pool(self.global_pool, self.num_classes),
            drop_rate=_rate("drop_rate", self.drop_rate),
            proj_drop_rate=_rate("proj_drop_rate", self.proj_drop_rate),
            drop_path_rate=_rate("drop_path_rate", self.drop_path_rate),
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self) and name in self:
            raise AttributeError(
                f"config.{name} must be set when the model is built, or by its set_grid() or reset_classifier(), "
                f"got {value!r}"
            )
        super().__setattr__(name, value)

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.__dataclass_fields__)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def replace(self, **changes: Any) -> HATNetConfig:
        """Copy the configuration with other values of some fields."""
        return HATNetConfig(**{**self, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments by name, for ``HATNet(**arguments)`` and for experiment trackers."""
        return dict(self)

    def to_json_string(self) -> str:
        """Return the arguments as a JSON object, one per line."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


TRAINED = tuple(f.name for f in dataclasses.fields(HATNetConfig) if f.metadata.get("trained"))
"""Arguments that weights are trained for; the others can change without retraining."""


def as_index(value: Any) -> int:
    """Convert an integer of any kind, also of NumPy, to int; raise TypeError for anything else."""
    if isinstance(value, bool):  # operator.index takes it for 0 or 1
        raise TypeError(f"{value!r} is not an integer")
    return operator.index(value)


def positive_int(name: str, value: int, lowest: int = 1) -> int:
    """Convert ``value`` to int; raise ValueError unless it is an integer of at least ``lowest``."""
    try:
        number = as_index(value)
    except TypeError:
        number = lowest - 1
    if number < lowest:
        raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
    return number


def positive_ints(name: str, values: Sequence[int], length: int) -> tuple[int, ...]:
    """Convert ``values`` to a tuple of ints; raise ValueError unless they are ``length`` integers of at least 1."""
    if not isinstance(values, Sequence) or len(values) != length:
        got = tuple(values) if isinstance(values, list) else values
        raise ValueError(f"{name} must be {length} integers, got {got!r}")
    return tuple(positive_int(name, value) for value in values)


def _attention(values: Sequence[str]) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 3:
        raise ValueError(f"attention must be 3 of {', '.join(ATTENTIONS)}, got {values!r}")
    return tuple(_one_of("attention", value, ATTENTIONS) for value in values)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def _global_pool(value: str, num_classes: int) -> str:
    if _one_of("global_pool", value, ("avg", "")) == "" and num_classes:
        raise ValueError(f"num_classes must be 0 with global_pool='', which returns maps, got {num_classes}")
    return value


def _rate(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, SupportsFloat) or not 0 <= float(value) < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
    return float(value)


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value
