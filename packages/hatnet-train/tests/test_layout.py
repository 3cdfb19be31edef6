"""The layout of the package: imports go down only, over at most five floors; former module names still work."""

import ast
import importlib
from pathlib import Path

import pytest

import hatnet_train
from hatnet_testing import warns
from hatnet_train._moved import MOVED

ROOT = Path(hatnet_train.__file__).parent

FLOORS = (
    {"__about__", "_moved", "config", "fields", "records", "recipes", "signals", "workers"},
    {"data", "deepspeed", "distributed", "optim", "precision"},
    {"classifier", "curves", "monitor", "page", "results", "run"},
    {"best", "callbacks", "evaluate", "finetune", "predict", "prediction_files", "train", "trainer"},
    {"__init__", "__main__", "cli", "errors", "predict_cli"},
)
"""Rooms, that is modules and folders, from the ground up."""


def modules():
    return {path.relative_to(ROOT).with_suffix("").parts: path for path in ROOT.rglob("*.py")}


def imports(path, names):
    """Modules of the package that a module imports, anywhere but for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "hatnet_train":
            package = tuple(node.module.split(".")[1:])
            for alias in node.names:
                inner = (*package, alias.name)
                yield inner if inner in names else package if package in names else (*package, "__init__")


def graph():
    names = modules()
    return {name: set(imports(path, names)) - {name, ("__init__",)} for name, path in names.items()}


def floor(module):
    (number,) = [number for number, rooms in enumerate(FLOORS) if module[0] in rooms]
    return number


def test_every_module_is_on_a_floor_and_imports_none_of_a_higher_one():
    assert len(FLOORS) <= 5
    upwards = [
        f"{'.'.join(name)} imports {'.'.join(other)}"
        for name, others in graph().items()
        for other in others
        if floor(other) > floor(name)
    ]
    assert upwards == []


def test_no_modules_import_each_other_in_a_circle():
    left = graph()
    while leaves := [name for name, others in left.items() if not others & left.keys()]:
        for name in leaves:
            del left[name]
    assert left == {}


def test_a_folder_imports_no_other_of_its_floor_that_imports_it():
    between = {(name[0], other[0]) for name, others in graph().items() for other in others if name[0] != other[0]}
    assert not [pair for pair in between if pair[::-1] in between]


@pytest.mark.parametrize("name", MOVED)
def test_a_former_module_warns_and_has_the_names_of_the_present_ones(name):
    with warns(DeprecationWarning, f"hatnet_train.{name}", *(f"hatnet_train.{new}" for new in MOVED[name])):
        former = importlib.import_module(f"hatnet_train.{name}")
    for new in MOVED[name]:
        present = importlib.import_module(f"hatnet_train.{new}")
        public = [key for key, value in vars(present).items() if getattr(value, "__module__", "") == present.__name__]
        assert public
        assert all(getattr(former, key) is vars(present)[key] for key in public)


def test_the_package_does_not_hide_deepspeed():
    import deepspeed

    import hatnet_train.deepspeed.engine

    assert deepspeed.initialize
    assert hatnet_train.deepspeed is not deepspeed
