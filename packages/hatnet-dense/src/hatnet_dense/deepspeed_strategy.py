"""MMEngine's DeepSpeed strategy for current DeepSpeed, with safe checkpoints.

MMEngine 0.10 imports optimizers that DeepSpeed has removed, skips the hooks when it saves and loads, and lets
DeepSpeed unpickle anything. Training and storage are MMEngine's: every checkpoint is a folder of DeepSpeed's files,
which ``hatnet_core.load_checkpoint`` and DeepSpeed's tools read.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

# The class is public, as "DeepSpeedStrategy" in MMEngine's registry. The function to replace in its module is not:
# test_deepspeed_strategy.py fails if it moves, or if it works again and need not be replaced.
from mmengine._strategy import deepspeed as upstream

from hatnet_core.checkpoint.zero import plain_records_only
from hatnet_dense.plain_checkpoint import plain

Callback = Callable[[dict[str, Any]], None]


def _register_no_optimizers() -> list[str]:
    """Replace ``register_deepspeed_optimizers``, which imports 1-bit optimizers that DeepSpeed has removed."""
    return []


class ZeroStrategy(upstream.DeepSpeedStrategy):  # type: ignore[misc]  # mmengine ships no types
    """MMEngine's ``DeepSpeedStrategy``, with its arguments, for MMEngine's ``FlexibleRunner``.

    In a config::

        runner_type = "FlexibleRunner"
        strategy = dict(type="ZeroStrategy", zero_optimization=dict(stage=2), train_micro_batch_size_per_gpu=2)
        optim_wrapper = dict(type="DeepSpeedOptimWrapper", optimizer=dict(type="AdamW", lr=1e-4))
    """

    def __init__(self, **arguments: Any) -> None:
        upstream.register_deepspeed_optimizers = _register_no_optimizers
        super().__init__(**arguments)
        self.config: dict[str, Any] = plain(self.config, "strategy")  # which DeepSpeed saves in every checkpoint

    def build_optim_wrapper(self, optim_wrapper: Any, model: Any = None) -> Any:
        """Build the optimizer, and apply ``auto_scale_lr``, which MMEngine skips with DeepSpeed."""
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
        """Write a checkpoint, a folder, with MMEngine's values as plain ones."""
        extra = {} if extra_ckpt is None else extra_ckpt
        if callback is not None:
            callback(extra)
        super().save_checkpoint(filename, extra_ckpt={key: plain(v, key) for key, v in extra.items()}, **arguments)

    def load_checkpoint(self, filename: str, *, callback: Callback | None = None, **arguments: Any) -> dict[str, Any]:
        """Load the weights of a checkpoint of this strategy.

        Raises:
            ValueError: if it does not fit the model or has more than tensors and plain records.
        """
        with _safely(filename):
            extra: dict[str, Any] = super().load_checkpoint(filename, **arguments)
        if callback is not None:
            callback(extra)
        return extra

    def resume(self, filename: str, *, callback: Callback | None = None, **arguments: Any) -> dict[str, Any]:
        """Load all of a checkpoint of this strategy to resume from it; raises as :meth:`load_checkpoint`."""
        with _safely(filename):
            extra: dict[str, Any] = super().resume(filename, **arguments)
        if callback is not None:
            callback(extra)
        return extra


@contextlib.contextmanager
def _safely(filename: str) -> Iterator[None]:
    try:
        with plain_records_only():
            yield
    except pickle.UnpicklingError as error:
        raise ValueError(f"{filename}: a checkpoint must have tensors and plain records only") from error
    except RuntimeError as error:  # torch's error for other names or shapes
        raise ValueError(f"{filename}: does not fit the model of the config: {error}") from error
