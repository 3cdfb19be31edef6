"""Read weights from a DeepSpeed checkpoint of any ZeRO stage, without unrestricted unpickling.

A checkpoint is a folder with ``*_model_states.pt`` and, from ZeRO-1 on, ``*_optim_states.pt``, each with one process's
part of the fp32 weights. Needs the extra ``hatnet-core[deepspeed]``, except for ZeRO-0.
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

MODEL_STATES = "*_model_states.pt"
OPTIMIZER_STATES = "*_optim_states.pt"


def checkpoint_folder(path: Path) -> Path:
    """Find the folder with the files: ``path``, or the newest in it, which DeepSpeed names in ``latest``.

    Raises:
        ValueError: if there is no DeepSpeed checkpoint.
    """
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_bytes()[:1000].decode(errors="replace").strip()
        if not re.fullmatch(r"[\w.+=-]{1,200}", tag) or tag in (".", ".."):  # another name could lead elsewhere
            raise ValueError(f"{latest} must name a folder next to it, got {tag[:80]!r}")
        path = path / tag
    if not any(path.glob(MODEL_STATES)):
        raise ValueError(
            f"{path} contains no weights: expected model.safetensors, as in a finished run of hatnet-train and in its "
            f"checkpoints, or DeepSpeed's {MODEL_STATES}"
        )
    return path


def read_zero(path: Path) -> Mapping[str, Any]:
    """Merge the fp32 weights of a checkpoint from the parts of all processes.

    Only tensors and DeepSpeed's own plain records are unpickled.

    Args:
        path: the folder of the checkpoint, or its parent with ``latest``.

    Returns:
        The state dict; under ZeRO-0, the dict that DeepSpeed wraps around it.

    Raises:
        ValueError: if parts are missing or damaged, or contain other objects.
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
        raise ValueError(f"{folder} is not a readable DeepSpeed checkpoint of plain tensors: {reason}") from error


def _merge(folder: Path) -> dict[str, Tensor]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # its logger keeps the sys.stdout of the import
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ImportError(
            f"{folder} is a checkpoint of ZeRO-1 or above, which needs DeepSpeed: pip install 'hatnet-core[deepspeed]'"
        ) from error
    silent = io.StringIO()  # it prints each step
    quiet = contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent)
    with plain_records_only(), quiet[0], quiet[1]:
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))


@contextlib.contextmanager
def plain_records_only() -> Iterator[None]:
    """Restrict ``torch.load`` to tensors and DeepSpeed's plain records, even in calls with ``weights_only=False``."""
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
