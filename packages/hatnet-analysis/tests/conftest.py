"""Shared by the tests of hatnet-analysis: fvcore, imported past its one warning, and a single thread."""

import contextlib
import warnings

import pytest
import torch

with warnings.catch_warnings():
    # fvcore 0.1.5 compiles a loss with torch.jit.script when it is imported
    warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
    import fvcore.nn  # noqa: F401

    # torch.jit again, and importlib's own of pkg_resources; absent in an environment without the dense libraries
    warnings.simplefilter("ignore")
    with contextlib.suppress(ImportError):
        import mmdet.models  # noqa: F401
        import mmseg.models  # noqa: F401
        import pkg_resources  # noqa: F401

        import hatnet_dense  # noqa: F401

DENSE = ("test_models.py", "test_paper.py")
"""Tests that build models of MMDetection and MMSegmentation."""

LIBRARIES = r"(mm(cv|det|engine|seg)|deepspeed|torch|importlib|pkg_resources|numpy)\b"
"""Modules whose own warnings we cannot fix; warnings raised in hatnet_analysis or its tests are errors."""

# threads that wait for each other on a busy machine take several times as long as one
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in DENSE:
            item.add_marker(pytest.mark.filterwarnings(f"ignore::Warning:{LIBRARIES}"))
