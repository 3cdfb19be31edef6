"""Shared by the tests of hatnet-dense: the libraries, imported past the warnings of their imports, and one thread."""

import warnings

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they were written for older versions of each other
    import mmdet.apis  # noqa: F401
    import mmengine.runner  # noqa: F401
    import mmseg.apis  # noqa: F401

collect_ignore = ["shapes"]
"""Configs, which only MMEngine can read, and the program that draws their data."""

LIBRARIES = r"(mm(cv|det|engine|seg)|deepspeed|pycocotools|torch|importlib|pkg_resources|numpy)\b"
"""Modules whose own warnings are not ours to mend; whatever is raised in hatnet_dense or its tests is an error."""

# threads that wait for each other on a busy machine take several times as long as one
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(f"ignore::Warning:{LIBRARIES}"))
