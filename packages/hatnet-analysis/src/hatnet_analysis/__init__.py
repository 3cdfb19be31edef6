"""Parameters, FLOPs and attention complexity of HAT-Net, counted as the paper counts them and completely."""

from hatnet_analysis.__about__ import __version__
from hatnet_analysis.complexity import h_mhsa_macs, mhsa_macs
from hatnet_analysis.flops import Count, Flops, count_flops, count_params

__all__ = [
    "Count",
    "Flops",
    "__version__",
    "count_flops",
    "count_params",
    "h_mhsa_macs",
    "mhsa_macs",
]
