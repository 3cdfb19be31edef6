"""Shared by the tests of hatnet-dense: mmengine, imported past its one warning, and a single thread."""

import warnings

import torch

with warnings.catch_warnings():
    # mmengine imports torch.distributed.optim, which torch itself compiles with the torch.jit it deprecates
    warnings.filterwarnings("ignore", r"`torch\.jit\.(script|interface)` is deprecated", DeprecationWarning)
    import mmengine.model  # noqa: F401

# threads that wait for each other on a busy machine take several times as long as one
torch.set_num_threads(1)
