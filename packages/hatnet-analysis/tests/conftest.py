"""Shared by the tests of hatnet-analysis: fvcore, imported past its one warning, and a single thread."""

import warnings

import torch

with warnings.catch_warnings():
    # fvcore 0.1.5 compiles a loss with torch.jit.script when it is imported
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
    import fvcore.nn  # noqa: F401

# threads that wait for each other on a busy machine take several times as long as one
torch.set_num_threads(1)
