"""MMEngine's DeepSpeed strategy for the DeepSpeed of today: ZeRO over many processes, checkpoints loaded safely.

MMEngine 0.10 asks DeepSpeed for optimizers that it no longer has, leaves the hooks out when it saves and loads, and
lets DeepSpeed unpickle whatever a checkpoint holds. What is trained and how it is stored is otherwise MMEngine's:
every checkpoint is a folder of DeepSpeed's files, which ``hatnet_core.load_checkpoint`` and DeepSpeed's tools read.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

from mmengine._strategy import deepspeed as upstream

from hatnet_core.checkpoint.zero import plain_records_only
from hatnet_dense.plain_checkpoint import plain

Callback = Callable[[dict[str, Any]], None]


def _without_lost_optimizers() -> list[str]:
    """Of MMEngine's list of DeepSpeed's optimizers, 1-bit Adam and its kin are gone; torch's are registered anyway."""
    return []


class ZeroStrategy(upstream.DeepSpeedStrategy):  # type: ignore[misc]  # mmengine ships no types
    """MMEngine's ``DeepSpeedStrategy``, with its arguments, for MMEngine's ``FlexibleRunner``.

    In a config::

        runner_type = "FlexibleRunner"
        strategy = dict(type="ZeroStrategy", zero_optimization=dict(stage=2), train_micro_batch_size_per_gpu=2)
        optim_wrapper = dict(type="DeepSpeedOptimWrapper", optimizer=dict(type="AdamW", lr=1e-4))
    """

    def __init__(self, **arguments: Any) -> None:
        upstream.register_deepspeed_optimizers = _without_lost_optimizers
        super().__init__(**arguments)
        self.config: dict[str, Any] = plain(self.config, "strategy")  # DeepSpeed writes it into every checkpoint

    def build_optim_wrapper(self, optim_wrapper: Any, model: Any = None) -> Any:
        """The optimizer, its learning rate scaled if the config asks for it, which MMEngine forgets with DeepSpeed."""
        self.optim_wrapper = super().build_optim_wrapper(optim_wrapper, model)
        self._scale_lr()
        return self.optim_wrapper

    def save_checkpoint(
        self,
        filename: str,
        *,
        extra_ckpt: dict[str, Any] | None = None,
        callback: Callback | None = None,
        **arguments: Any,
    ) -> None:
        """Write a checkpoint, a folder; what MMEngine adds is plain, as :func:`plain` makes it."""
        extra = {} if extra_ckpt is None else extra_ckpt
        if callback is not None:
            callback(extra)
        super().save_checkpoint(filename, extra_ckpt={key: plain(v, key) for key, v in extra.items()}, **arguments)

    def load_checkpoint(self, filename: str, *, callback: Callback | None = None, **arguments: Any) -> dict[str, Any]:
        """Load the weights of a checkpoint of this strategy.

        Raises:
            ValueError: if it holds more than tensors and plain records.
        """
        with _safely(filename):
            extra: dict[str, Any] = super().load_checkpoint(filename, **arguments)
        return _told(extra, callback)

    def resume(self, filename: str, *, callback: Callback | None = None, **arguments: Any) -> dict[str, Any]:
        """Load all of a checkpoint of this strategy, to go on from it; raises as :meth:`load_checkpoint`."""
        with _safely(filename):
            extra: dict[str, Any] = super().resume(filename, **arguments)
        return _told(extra, callback)


@contextlib.contextmanager
def _safely(filename: str) -> Iterator[None]:
    try:
        with plain_records_only():
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{filename} holds more than tensors and plain records, and is not loaded") from error
    except RuntimeError as error:  # how torch says that names or shapes differ
        raise ValueError(f"{filename} does not fit the model of the config: {error}") from error


def _told(extra: dict[str, Any], callback: Callback | None) -> dict[str, Any]:
    if callback is not None:
        callback(extra)
    return extra
