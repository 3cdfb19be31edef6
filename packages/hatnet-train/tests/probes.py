"""hatnet-train with callbacks that a test looks through, in a process of its own."""

import json
import weakref

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch.utils._python_dispatch import TorchDispatchMode

from hatnet_train.callbacks import Callback, register
from hatnet_train.cli import train
from hatnet_train.deepspeed.partition import full_weights, gather_moments
from hatnet_train.run.state import contents


class Observe(Callback):
    """Note the hooks that are called, and write them when the last one is."""

    def __init__(self):
        self.called = []

    def __getattribute__(self, name):
        if name in vars(Callback) and not name.startswith("_"):
            object.__getattribute__(self, "called").append(name)
        return object.__getattribute__(self, name)

    def close(self, trainer):
        (trainer.out / f"hooks-{trainer.rank}.json").write_text(json.dumps(self.called))


def observe(arguments):
    """hatnet-train that writes down which hooks it calls."""
    register(Observe)
    return train(arguments)


class StopAfterTwo(Callback):
    """End the run after two epochs."""

    def after_epoch(self, trainer, row):
        if row["epoch"] == 2:
            trainer.stop()


def stop_early(arguments):
    """hatnet-train that ends after two epochs."""
    register(StopAfterTwo)
    return train(arguments)


class Recover(Callback):
    """Raise an error in the middle of the first epoch, and let the run continue."""

    failed = False

    def after_step(self, trainer, step):
        if trainer.state.step == 1 and not self.failed:
            self.failed = True
            raise ArithmeticError

    def on_exception(self, trainer, error):
        return isinstance(error, ArithmeticError)


def recover(arguments):
    """hatnet-train that recovers from an error."""
    register(Recover)
    return train(arguments)


class Allocations(TorchDispatchMode):
    """Most bytes of new tensors that are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if hasattr(tensor, "untyped_storage"):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known and not self._of(args, storage):
                    self.known[storage.data_ptr()] = storage.nbytes()
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(tensor, self._gone, storage.data_ptr())
        return result

    @staticmethod
    def _of(args, storage):
        return any(
            hasattr(a, "untyped_storage") and a.untyped_storage().data_ptr() == storage.data_ptr() for a in args
        )

    def _gone(self, pointer):
        self.alive -= self.known.pop(pointer, 0)


class MeasureSave(Callback):
    """Measure what a checkpoint allocates and gathers on this rank."""

    def after_run(self, trainer):
        sizes = [4 * p.numel() for p in trainer.engine.module.parameters()]
        with Allocations() as allocations:
            files = contents(
                trainer.engine, trainer.ema, trainer.state, trainer.config, data={}, description={"classes": []}
            )
        gathered = 0
        for name, write in files.items():
            path = trainer.out / f"probe-{name}"
            write(path)
            gathered += path.stat().st_size if path.suffix == ".safetensors" else 0
        found = {"model": sum(sizes), "largest": max(sizes), "peak": allocations.peak, "gathered": gathered}
        (trainer.out / f"memory-{trainer.rank}.json").write_text(json.dumps(found))


def measure_save(arguments):
    """hatnet-train that measures a save."""
    register(MeasureSave)
    return train(arguments)


class ComparePartitions(Callback):
    """Compare the tensors that we gather with those of DeepSpeed's public functions, bit by bit.

    DeepSpeed 0.19 finds no moments under ZeRO-1 and 2 where there are several parameter groups.
    """

    def after_run(self, trainer):
        engine = trainer.engine
        weights, moments = full_weights(engine), gather_moments(engine)
        different = []
        for name, parameter in engine.module.named_parameters():
            pairs = [(weights[name], safe_get_full_fp32_param(parameter))]
            for key in ("exp_avg", "exp_avg_sq") if engine.zero_optimization_stage() == 3 else ():
                pairs.append((moments.get(f"{key}/{name}"), safe_get_full_optimizer_state(parameter, key)))
            bad = [ours is not None and not torch.equal(ours, theirs) for ours, theirs in pairs]
            different += [name] if any(bad) else []
        gathered = {"weights": len(weights), "moments": len(moments), "different": different}
        (trainer.out / f"partitions-{trainer.rank}.json").write_text(json.dumps(gathered))


def compare_partitions(arguments):
    """hatnet-train that compares its view of ZeRO's partitions with DeepSpeed's."""
    register(ComparePartitions)
    return train(arguments)
