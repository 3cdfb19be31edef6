"""Former module names: importing one warns, and gives its names from where they are now."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "checkpoint": ("run.checkpoint",),
    "deepspeed_config": ("deepspeed.config", "optim"),
    "engine": ("deepspeed.engine",),
    "evaluation": ("evaluate",),
    "launch": ("distributed.environment", "distributed.errors", "distributed.rendezvous", "distributed.launch"),
    "record": ("run.record",),
    "sampler": ("data.order",),
    "state": ("run.state",),
    "verify": ("run.folder",),
    "watch": ("distributed.heartbeat",),
    "weights": ("deepspeed.partition", "deepspeed.ema"),
}
"""Present modules by the former one."""


class Finder(MetaPathFinder, Loader):
    """Find the former modules of this package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a name of :data:`MOVED`."""
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == __package__ and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Fill it with the names of the present modules."""
        present = [f"{__package__}.{name}" for name in MOVED[module.__name__.rpartition(".")[2]]]
        warnings.warn(f"{module.__name__} has moved to {' and '.join(present)}", DeprecationWarning, stacklevel=2)
        for name in present:
            found = vars(importlib.import_module(name))
            vars(module).update({key: value for key, value in found.items() if not key.startswith("__")})


def install() -> None:
    """Let the former names be imported."""
    sys.meta_path.append(Finder())
