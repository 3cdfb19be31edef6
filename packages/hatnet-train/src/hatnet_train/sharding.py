"""Where DeepSpeed keeps the parameters: whole in every process, or cut into flat partitions under ZeRO.

For every parameter one process holds a piece of the fp32 tensor that its optimizer steps on, the *master*: all of it
without ZeRO, a part of a flat partition under ZeRO-1 to 3. :func:`gather` puts whole tensors together from what
belongs to the masters - the weights themselves, the optimizer's moments, a moving average - and :func:`scatter` is its
inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor


class _Piece(NamedTuple):
    """The part of a parameter, flattened, from ``start`` on, that lies in ``master``, flattened, from ``at`` on."""

    master: Tensor
    at: int
    start: int
    length: int


def masters(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """The tensors that the optimizer of this process steps on."""
    unique = {id(piece.master): piece.master for piece in _pieces(engine).values() if piece is not None}
    return list(unique.values())


def gather(
    engine: deepspeed.DeepSpeedEngine, belonging: Callable[[Tensor], Tensor], *, to: int | None = None
) -> dict[str, Tensor]:
    """Gather whole fp32 tensors of the parameters' shapes, by name. All ranks have to call it.

    One tensor at a time is put together on the device. Ranks that get nothing keep nothing of it.

    Args:
        engine: whose parameters.
        belonging: from a master to a tensor of its size, such as a moment of the optimizer.
        to: the rank that gets them, in the memory of its processor; by default every rank gets them, on its device.
    """
    divided = engine.zero_optimization() and dist.get_world_size() > 1
    receives = to in (None, dist.get_rank())
    wholes: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        piece = _piece(engine, parameter)
        if not (divided or receives):
            continue
        whole = torch.zeros(_shape(parameter), device=engine.device)
        if piece is not None:
            part = belonging(piece.master).detach().reshape(-1)[piece.at : piece.at + piece.length]
            whole.view(-1)[piece.start : piece.start + piece.length] = part
        if divided and to is None:
            dist.all_reduce(whole)  # everywhere but in one process, a place is zero
        elif divided:
            dist.reduce(whole, dst=to)
        if receives:
            wholes[name] = whole if to is None else whole.cpu()
    return wholes


def scatter(
    engine: deepspeed.DeepSpeedEngine, tensors: Mapping[str, Tensor], belonging: Callable[[Tensor], Tensor]
) -> None:
    """Write whole tensors, by the parameters' names, into what belongs to the masters of this process.

    Args:
        engine: whose parameters.
        tensors: one of its shape for every parameter.
        belonging: from a master to the tensor of its size that is written to.
    """
    for name, piece in _pieces(engine).items():
        if piece is not None:
            part = tensors[name].reshape(-1)[piece.start : piece.start + piece.length]
            with torch.no_grad():
                belonging(piece.master).view(-1)[piece.at : piece.at + piece.length] = part.to(piece.master.device)


def gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[Tensor]:
    """The gradients of a step that this process holds, after the last backward pass and before the update."""
    shared = getattr(engine.optimizer, "averaged_gradients", None)
    if shared is None:
        yield from (p.grad for p in engine.module.parameters() if p.grad is not None)
        return
    for group in shared.values():
        yield from [group] if torch.is_tensor(group) else group or ()


def _pieces(engine: deepspeed.DeepSpeedEngine) -> dict[str, _Piece | None]:
    """The piece of every parameter that this process holds, by name; None where others hold all of it."""
    return {name: _piece(engine, parameter) for name, parameter in engine.module.named_parameters()}


def _piece(engine: deepspeed.DeepSpeedEngine, parameter: Any) -> _Piece | None:
    zero = engine.optimizer
    if hasattr(parameter, "ds_id"):  # ZeRO-3: cut evenly, the last part padded
        group, at, length = zero.grad_position[zero.get_param_id(parameter)]
        start = int(length) * dist.get_rank()
        real = max(0, min(int(length), parameter.ds_numel - start))
        return _Piece(zero.fp32_partitioned_groups_flat[group], int(at), start, real) if real else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2, and DeepSpeed's bf16
        place = parameter._hp_mapping
        if place is None:
            return None
        (master,) = zero.optimizer.param_groups[place.param_group_index]["params"]
        of_master, of_parameter = place.hp_fragment_address, place.lp_fragment_address
        return _Piece(master, of_master.start, of_parameter.start, of_master.numel)
    return _Piece(parameter, 0, 0, parameter.numel())


def _shape(parameter: Any) -> torch.Size:
    """The whole parameter's shape; under ZeRO-3 it is empty itself."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
