"""Partitioned state: weights, moments and averages under ZeRO, gathered and scattered by parameter.

A *master* is a fp32 tensor that the optimizer of this process steps on: a parameter without ZeRO, a flat partition of
many under ZeRO-1 to 3. :func:`gather` builds whole tensors from what belongs to the masters: weights, moments or a
moving average. :func:`scatter` is its inverse.

This module alone reads private layouts of DeepSpeed: its public ``safe_get_full_*`` do not serve for a moving average,
for moments (see :func:`gather_moments`) or without ZeRO. ``test_partition.py`` compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist
from torch import Tensor

from hatnet_core import HATNet


class _Piece(NamedTuple):
    """Part of a flattened parameter from ``start``, kept in a flattened ``master`` from ``at``."""

    master: Tensor
    at: int
    start: int
    length: int


def masters(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """List the tensors that the optimizer of this process steps on."""
    unique = {id(piece.master): piece.master for piece in _pieces(engine).values() if piece is not None}
    return list(unique.values())


def gather(
    engine: deepspeed.DeepSpeedEngine, belonging: Callable[[Tensor], Tensor], *, to: int | None = None
) -> dict[str, Tensor]:
    """Gather whole fp32 tensors of the trainable parameters' shapes, by name. All ranks have to call it.

    One tensor at a time is put together on the device. Ranks that get nothing keep nothing of it.

    Args:
        engine: whose parameters.
        belonging: from a master to a tensor of its size, such as a moment of the optimizer.
        to: the rank that gets them, in the memory of its processor; by default every rank gets them, on its device.
    """
    divided = engine.zero_optimization() and dist.get_world_size() > 1
    receives = to in (None, dist.get_rank())
    wholes: dict[str, Tensor] = {}
    for name, parameter in trainable(engine).items():
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
        tensors: one of its shape for every trainable parameter; others are ignored.
        belonging: from a master to the tensor of its size that is written to.
    """
    for name, piece in _pieces(engine).items():
        if piece is not None:
            part = tensors[name].reshape(-1)[piece.start : piece.start + piece.length]
            with torch.no_grad():
                belonging(piece.master).view(-1)[piece.at : piece.at + piece.length] = part.to(piece.master.device)


def full_weights(engine: deepspeed.DeepSpeedEngine, *, to: int | None = None) -> dict[str, Tensor]:
    """Gather all weights in fp32, by the names of :class:`HATNet`, as :func:`gather` does."""
    return with_frozen(engine, gather(engine, lambda master: master, to=to), to=to)


def with_frozen(
    engine: deepspeed.DeepSpeedEngine, tensors: dict[str, Tensor], *, to: int | None = None
) -> dict[str, Tensor]:
    """Add the weights that are not trained to what :func:`gather` returned. All ranks have to call it."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            continue
        with deepspeed.zero.GatheredParameters(parameter):  # without effect but under ZeRO-3
            if to in (None, dist.get_rank()):
                whole = parameter.detach().float().clone()
                tensors[name] = whole if to is None else whole.cpu()
    return tensors


def trainable(engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """Parameters by name, without frozen ones, which no optimizer has."""
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def whole_model(engine: deepspeed.DeepSpeedEngine, weights: dict[str, Tensor]) -> HATNet:
    """Build the engine's model with these weights, in evaluation mode, outside of DeepSpeed."""
    with torch.device("meta"):  # no time for weights that are replaced at once
        model = HATNet(**engine.module.config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def gradients(engine: deepspeed.DeepSpeedEngine) -> Iterator[Tensor]:
    """Yield the gradients of this process, between the last backward pass and the update."""
    shared = getattr(engine.optimizer, "averaged_gradients", None)
    if shared is None:
        yield from (p.grad for p in engine.module.parameters() if p.grad is not None)
        return
    for group in shared.values():
        yield from [group] if torch.is_tensor(group) else group or ()


def loss_scaler(engine: deepspeed.DeepSpeedEngine) -> Any:
    """Loss scaler of fp16: torch's GradScaler, or DeepSpeed's own; None without one."""
    scaler = getattr(engine, "torch_autocast_z0_gradscaler", None)
    if scaler is None and engine.fp16_enabled():
        scaler = engine.optimizer.loss_scaler
    return scaler


def _optimizer(engine: deepspeed.DeepSpeedEngine) -> Any:
    """Optimizer inside of DeepSpeed's, or the only one."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def gather_moments(engine: deepspeed.DeepSpeedEngine) -> dict[str, Tensor]:
    """Gather the optimizer's tensors of the parameters' shapes on rank 0, ``MOMENT/PARAMETER``.

    There are none before the first step. DeepSpeed's ``safe_get_full_optimizer_state`` does not serve: it gathers on
    every rank, knows nothing without ZeRO, and under ZeRO-1 and 2 finds no moments of a second parameter group.
    ``safe_set_full_optimizer_state`` cannot set any before a first step.
    """
    states = _optimizer(engine).state
    names = {
        name
        for master in masters(engine)
        for name, value in states.get(master, {}).items()
        if torch.is_tensor(value) and value.numel() == master.numel() and value.ndim
    }
    if not names and engine.global_steps > engine.skipped_steps:
        raise RuntimeError("the optimizer steps on other tensors than sharding.masters knows: its moments were lost")
    moments: dict[str, Tensor] = {}
    for moment in sorted(names):
        whole = gather(engine, lambda master: states[master][moment], to=0)  # noqa: B023  called at once
        moments |= {f"{moment}/{name}": tensor for name, tensor in whole.items()}
    return moments


def optimizer_scalars(engine: deepspeed.DeepSpeedEngine) -> dict[str, float]:
    """Numbers of the optimizer, the same for all parameters."""
    for state in _optimizer(engine).state.values():
        numbers = {name: value for name, value in state.items() if not torch.is_tensor(value) or value.ndim == 0}
        return {name: value.item() if torch.is_tensor(value) else value for name, value in numbers.items()}
    return {}


def load_moments(
    engine: deepspeed.DeepSpeedEngine, moments: Mapping[str, Tensor], scalars: Mapping[str, float]
) -> None:
    """Restore the optimizer's moments and numbers, on any number of processes."""
    optimizer = _optimizer(engine)
    own = masters(engine)
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for master in own if moments else []:
        for name, value in scalars.items():  # torch's count of steps is a tensor, DeepSpeed's a number
            device = master.device if fused else "cpu"
            optimizer.state[master][name] = torch.tensor(value, device=device) if isinstance(value, float) else value
    for moment in sorted({name.partition("/")[0] for name in moments}):
        for master in own:
            optimizer.state[master][moment] = torch.zeros_like(master)
        tensors = {name.partition("/")[2]: t for name, t in moments.items() if name.startswith(f"{moment}/")}
        scatter(engine, tensors, lambda master: optimizer.state[master][moment])  # noqa: B023  called at once


def _pieces(engine: deepspeed.DeepSpeedEngine) -> dict[str, _Piece | None]:
    """Pieces of the trainable parameters on this process by name; None for those that are on others."""
    return {name: _piece(engine, parameter) for name, parameter in trainable(engine).items()}


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
    """Shape of the whole parameter; under ZeRO-3 it is empty itself."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
