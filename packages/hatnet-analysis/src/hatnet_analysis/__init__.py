"""HAT-Net measured: parameters, FLOPs, complexity (Eq. 5 and 15), speed, attention maps, and the paper's tables."""

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.attention_maps import attention_weights, record_weights, rollout
from hatnet_analysis.complexity import (
    h_mhsa_macs,
    h_mhsa_macs_completed,
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
    "h_mhsa_macs_completed",
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
