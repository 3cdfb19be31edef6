"""Runs that cannot start end before any work, in an error that names what is missing."""

import copy
import functools

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper

from hatnet_dense import runs
from hatnet_dense.config import load_config
from hatnet_dense.errors import LONGEST
from hatnet_dense.workers import Workers
from hatnet_testing import check, raises

NAME = "retinanet_hatnet-t_fpn_1x_coco"
WHOLE = {
    "state_dict": {},
    "meta": {"epoch": 1, "iter": 4},
    "optimizer": {},
    "param_schedulers": [],
    "message_hub": {},
}


@functools.cache
def read():
    return load_config(NAME)


@pytest.fixture
def config():
    return copy.deepcopy(read())


def without(config, key):
    config.merge_from_dict({key: None})
    return config


@pytest.mark.parametrize("key", ["train_dataloader", "train_dataloader.dataset", "train_cfg", "optim_wrapper"])
def test_training_names_what_the_config_lacks(key, config, tmp_path):
    with raises(ValueError, key):
        runs.train(without(config, key), tmp_path)


@pytest.mark.parametrize("key", ["test_dataloader", "test_dataloader.dataset", "test_cfg", "test_evaluator"])
def test_testing_names_what_the_config_lacks(key, config, tmp_path):
    with raises(ValueError, key):
        runs.evaluate(without(config, key), tmp_path / "absent.pth", tmp_path)


@pytest.mark.parametrize("key", ["default_hooks", "default_hooks.visualization", "visualizer"])
def test_drawing_names_what_the_config_lacks(key, config, tmp_path):
    torch.save(WHOLE, tmp_path / "a.pth")
    with raises(ValueError, key, "--show-dir"):
        runs.evaluate(without(config, key), tmp_path / "a.pth", tmp_path, tmp_path / "drawn")


def test_scaling_the_learning_rate_names_what_the_config_lacks(config, tmp_path):
    with raises(ValueError, "auto_scale_lr", "--auto-scale-lr"):
        runs.train(without(config, "auto_scale_lr"), tmp_path, auto_scale_lr=True)


@pytest.mark.parametrize(
    ("note", "named"),
    [
        ("", ["last_checkpoint", "''", "--resume"]),
        ("FOLDER/absent.pth", ["last_checkpoint", "--resume"]),
        ("FOLDER/truncated.pth", []),
        ("FOLDER/foreign.pth", []),
        ("FOLDER/weights.pth", ["load_from"]),
    ],
)
def test_a_last_checkpoint_that_cannot_be_resumed_is_named(note, named, config, tmp_path):
    torch.save(WHOLE, tmp_path / "whole.pth")
    (tmp_path / "truncated.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:300])
    (tmp_path / "foreign.pth").write_text("<html>")
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "weights.pth")
    last = note.replace("FOLDER", str(tmp_path))
    (tmp_path / "last_checkpoint").write_text(last)
    with raises(ValueError, last, *named):
        runs.train(config, tmp_path, "auto")


@pytest.mark.parametrize("key", ["meta", "optimizer", "param_schedulers", "message_hub"])
def test_a_checkpoint_that_lacks_a_part_is_not_resumed(key, config, tmp_path):
    torch.save({name: value for name, value in WHOLE.items() if name != key}, tmp_path / "a.pth")
    with raises(ValueError, tmp_path / "a.pth", "load_from"):
        runs.train(config, tmp_path, str(tmp_path / "a.pth"))


@pytest.mark.parametrize(("dtype", "scale"), [("float16", "dynamic"), ("bfloat16", 1.0)])
def test_mixed_precision_is_the_wrapper_of_mmengine_in_that_dtype(dtype, scale, config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # MMEngine's logger asks for its number
    runs._use_amp(config, dtype)
    assert config.optim_wrapper.loss_scale == scale
    wrapper = build_optim_wrapper(torch.nn.Linear(2, 3), config.optim_wrapper)
    assert type(wrapper) is AmpOptimWrapper
    assert wrapper.cast_dtype == getattr(torch, dtype)


def test_a_file_whose_writing_fails_is_not_there_and_leaves_the_old_one(tmp_path):
    (tmp_path / "m.json").write_text("old")
    with pytest.raises(TypeError):
        runs.write_metrics({"a": object()}, tmp_path / "m.json")
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]
    assert (tmp_path / "m.json").read_text() == "old"


def test_a_message_of_the_libraries_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(runs.Runner, "from_cfg", lambda _: (_ for _ in ()).throw(ValueError("x" * 5000)))
    with raises(ValueError, "x" * LONGEST + "…"):
        runs._runner(Config({"test_dataloader": {}}), "none", "test", Workers("test_dataloader"))


@pytest.mark.parametrize(
    ("scheduler", "end"),
    [
        ({"type": "LinearLR", "by_epoch": False, "end": 500}, 500),
        ({"type": "LinearLR", "by_epoch": False, "end": 16}, None),
        ({"type": "LinearLR", "end": 5}, 20),
        ({"type": "LinearLR", "end": 4}, None),
        ({"type": "MultiStepLR", "end": 12, "milestones": [8, 11]}, None),
    ],
)
def test_a_warmup_that_is_longer_than_the_run_is_named_with_both_lengths(scheduler, end):
    lines = list(runs._long_warmups([scheduler], iterations=16, per_epoch=4))
    assert len(lines) == (end is not None)
    for line in lines:
        check(line, "param_scheduler.0.end", end, "16 iterations")


def test_a_run_of_one_iteration_has_one_iteration():
    (line,) = runs._long_warmups({"type": "LinearLR", "by_epoch": False, "end": 5}, iterations=1, per_epoch=4)
    check(line, "1 iteration", 5)
