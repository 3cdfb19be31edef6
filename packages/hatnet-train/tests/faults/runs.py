"""Run folders: what two of them have in common, and what a fault left of one."""

import hashlib
import json

import torch
from safetensors.torch import load_file

from hatnet_core import read_metadata
from hatnet_train.run.checkpoint import MANIFEST, check, committed

TIMES = {"images_per_second", "data_wait", "memory_gb", "seconds"}
"""Metrics of the machine."""


def rows(out):
    """Metrics of the epochs without those of the machine."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def state(checkpoint):
    """Return the content of a checkpoint's state.json without times."""
    content = json.loads((checkpoint / "state.json").read_text())
    own = {"seconds", "waited", "config", "rows"}
    return {name: value for name, value in content.items() if name not in own}


def steps(out):
    """Steps of the committed checkpoints, the newest first."""
    return [int(folder.name.split("-")[1]) for folder in committed(out / "checkpoints")]


def newest(checkpoints):
    """The newest checkpoint that is whole, and the problems of those that are newer."""
    problems = []
    for folder in committed(checkpoints):
        if not (found := list(check(folder))):
            return folder, problems
        problems += found
    return None, problems


def sign(folder, name):
    """List the present content of a file in the manifest, as whoever can write the one file can write the other."""
    manifest = json.loads((folder / MANIFEST).read_text())
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def assert_all_whole(out):
    """Every folder that has the name of a checkpoint is one, and at least one is there."""
    folders = committed(out / "checkpoints")
    assert [problem for folder in folders for problem in check(folder)] == []
    assert folders


def assert_same_bits(out, reference):
    """Weights, their average, moments of the optimizer and metrics of two runs are the same, bit for bit."""
    assert rows(out) == rows(reference)
    ours, theirs = (committed(folder / "checkpoints")[0] for folder in (out, reference))
    assert ours.name == theirs.name
    assert state(ours) == state(theirs)
    weights = ("model.safetensors", "model_ema.safetensors")
    for one, two, names in ((ours, theirs, (*weights, "optimizer.safetensors")), (out, reference, weights)):
        for name in names:
            tensors, expected = load_file(one / name), load_file(two / name)
            assert tensors.keys() == expected.keys()
            assert [key for key in expected if not torch.equal(tensors[key], expected[key])] == [], name
    assert all(read_metadata(out / name) == read_metadata(reference / name) for name in weights)


def distance(out, reference):
    """Norm of the difference of the final weights of two runs, as a share of their norm."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, reference))
    square = sum((ours[name] - tensor).double().square().sum() for name, tensor in theirs.items())
    return float((square / sum(tensor.double().square().sum() for tensor in theirs.values())).sqrt())
