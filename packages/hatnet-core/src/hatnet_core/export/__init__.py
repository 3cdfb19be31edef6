"""Export a model: programs and graphs for other runtimes, and folders for Hugging Face.

``graphs.py`` traces, ``formats.py`` lists the formats with their writers and runtimes, ``int8.py`` quantises,
``compare.py`` measures, ``huggingface.py`` writes folders. The command is ``hatnet-export`` (``cli.py``).
"""

from hatnet_core.export.formats import open_export, read_description
from hatnet_core.export.graphs import TOLERANCE, check_shapes, export_onnx, export_program, largest_difference

__all__ = [
    "TOLERANCE",
    "check_shapes",
    "export_onnx",
    "export_program",
    "largest_difference",
    "open_export",
    "read_description",
]
