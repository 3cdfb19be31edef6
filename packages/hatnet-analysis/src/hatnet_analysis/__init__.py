"""Parameters, FLOPs, complexity (Eq. 5 and 15), speed and attention maps of HAT-Net, and the paper's tables.

Names are imported when they are first used, so that the command's ``--help`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hatnet_analysis.__about__ import __version__

if TYPE_CHECKING:
    from hatnet_analysis.attention_maps import attention_weights, record_weights, rollout
    from hatnet_analysis.complexity import (
        h_mhsa_macs,
        h_mhsa_macs_padded,
        mhsa_macs,
        reduction_macs,
        stage_complexity,
        window_macs,
    )
    from hatnet_analysis.flops import Count, Flops, count_flops, count_params
    from hatnet_analysis.memory import peak_memory
    from hatnet_analysis.models import load_model
    from hatnet_analysis.paper import table_rows
    from hatnet_analysis.throughput import Settings, compare, measure_throughput

MODULES = ("attention_maps", "complexity", "flops", "memory", "models", "paper", "throughput")
"""Modules that define the names of ``__all__``."""

RENAMED = {"h_mhsa_macs_completed": "h_mhsa_macs_padded"}
"""Former names, which still work."""

__all__ = [
    "Count",
    "Flops",
    "Settings",
    "__version__",
    "attention_weights",
    "compare",
    "count_flops",
    "count_params",
    "h_mhsa_macs",
    "h_mhsa_macs_padded",
    "load_model",
    "measure_throughput",
    "mhsa_macs",
    "peak_memory",
    "record_weights",
    "reduction_macs",
    "rollout",
    "stage_complexity",
    "table_rows",
    "window_macs",
]


def __getattr__(name: str) -> Any:
    name = RENAMED.get(name, name)
    if name in __all__:
        for module in map(import_module, (f"{__name__}.{module}" for module in MODULES)):
            if getattr(vars(module).get(name), "__module__", None) == module.__name__:
                return vars(module)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
