"""Shared by the tests of hatnet-dense: libraries imported without their warnings, one thread, drawn data."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # they were written for older versions of each other
    import mmdet.apis  # noqa: F401
    import mmengine.runner  # noqa: F401
    import mmseg.apis  # noqa: F401

collect_ignore = ["shapes"]
"""Folder of configs, which only MMEngine can read, and of the program that draws their data."""

LIBRARIES = r"(mm(cv|det|engine|seg)|deepspeed|pycocotools|torch|importlib|pkg_resources|numpy)\b"
"""Modules whose warnings are ignored; warnings from hatnet_dense or its tests are errors."""

# several threads are slower than one on a busy machine
torch.set_num_threads(1)


SHAPES = Path(__file__).parent / "shapes"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Draw the small dataset that the configs in ``shapes`` name, and return its folder."""
    out = tmp_path_factory.mktemp("shapes")
    command = [sys.executable, str(SHAPES / "draw.py"), str(out), "--train", "16", "--val", "4"]
    subprocess.run(command, check=True)
    os.environ["SHAPES"] = str(out)
    yield out
    del os.environ["SHAPES"]


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings(f"ignore::Warning:{LIBRARIES}"))
