"""Load and save weights: our safetensors files, the released files, and what other programs write.

Our files contain the parameters under the names of :class:`hatnet_core.HATNet` and, as JSON in the safetensors
metadata, the configuration that builds the model. A file is opened once and passes three steps:

``reading.py``
    content of the file (``zero.py`` for DeepSpeed's folders), then the weights under our names (``foreign.py``,
    ``released.py``)
``matching.py``
    comparison of names, shapes and values with the model
``loading.py``
    the weights in the model, or a new model

``saving.py`` writes our files.
"""

from hatnet_core.checkpoint.loading import load_checkpoint, load_model
from hatnet_core.checkpoint.matching import head_size
from hatnet_core.checkpoint.reading import (
    SIZE,
    WEIGHTS,
    Checkpoint,
    find_metadata,
    read_checkpoint,
    read_metadata,
    read_state,
    trained_size,
)
from hatnet_core.checkpoint.saving import save_checkpoint

__all__ = [
    "SIZE",
    "WEIGHTS",
    "Checkpoint",
    "find_metadata",
    "head_size",
    "load_checkpoint",
    "load_model",
    "read_checkpoint",
    "read_metadata",
    "read_state",
    "save_checkpoint",
    "trained_size",
]
