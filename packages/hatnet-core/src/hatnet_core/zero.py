"""Weights out of a DeepSpeed checkpoint of any ZeRO stage, without DeepSpeed's unrestricted unpickling.

A checkpoint is a folder: the files ``*_model_states.pt`` and, from ZeRO-1 on, ``*_optim_states.pt`` with the parts of
the fp32 weights that each process held. Needs the extra ``hatnet-core[deepspeed]``, except for ZeRO-0.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL_STATES, OPTIMIZER_STATES = "*_model_states.pt", "*_optim_states.pt"


def checkpoint_folder(path: Path) -> Path:
    """The folder with the files: ``path`` itself, or the newest in it, which DeepSpeed names in ``latest``.

    Raises:
        ValueError: if it is no folder of a DeepSpeed checkpoint.
    """
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_bytes()[:1000].decode(errors="replace").strip()
        if not re.fullmatch(r"[\w.+=-]{1,200}", tag) or tag in (".", ".."):  # another name could lead elsewhere
            raise ValueError(f"{latest} must name a folder beside it, got {tag[:80]!r}")
        path = path / tag
    if not any(path.glob(MODEL_STATES)):
        raise ValueError(
            f"{path} holds no weights: expected model.safetensors, as in the folder of a run of hatnet-train that is "
            f"done, or of one of its checkpoints; or DeepSpeed's {MODEL_STATES}"
        )
    return path


def read_zero(path: Path) -> Mapping[str, Any]:
    """The fp32 weights of a checkpoint, put together from the parts of all processes.

    Nothing but tensors and DeepSpeed's own plain records is unpickled.

    Args:
        path: the folder of the checkpoint, or the one that holds it and ``latest``.

    Returns:
        The state dict, or under ZeRO-0 the dict in which DeepSpeed wraps it.

    Raises:
        ValueError: if parts are missing or damaged, or hold other objects.
        ImportError: if DeepSpeed is not installed and the checkpoint is of ZeRO-1 or above.
    """
    folder = checkpoint_folder(path)
    (first, *_) = sorted(folder.glob(MODEL_STATES))
    try:
        if not any(folder.glob(OPTIMIZER_STATES)):
            content: Mapping[str, Any] = torch.load(first, map_location="cpu", weights_only=True)
            return content
        return _merge(folder)
    except ImportError:
        raise
    except Exception as error:  # damaged parts make the unpickler and DeepSpeed's merging raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{folder} is not a whole DeepSpeed checkpoint of plain tensors: {reason}") from error


def _merge(folder: Path) -> dict[str, Tensor]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # its logger takes what is standard output now, for ever
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ImportError(
            f"{folder} is a checkpoint of ZeRO-1 or above, which needs DeepSpeed: pip install 'hatnet-core[deepspeed]'"
        ) from error
    silent = io.StringIO()  # it prints every step
    quiet = contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent)
    with plain_records_only(), quiet[0], quiet[1]:
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


@contextlib.contextmanager
def plain_records_only() -> Iterator[None]:
    """Make ``torch.load`` unpickle tensors and DeepSpeed's own plain records alone, even where it asks for all."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
