"""Checkpoints of MMEngine are written so that they load safely, and come back unchanged."""

import logging
from collections import Counter, OrderedDict, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from torch import nn

from hatnet_dense.plain_checkpoint import PlainCheckpointHook, check_weights, plain, read_checkpoint
from hatnet_testing import check, raises


def runner(model, **attributes):
    return SimpleNamespace(**{"model": model, "cfg": {}, "optim_wrapper": None, **attributes})


def checkpoint(model):
    hub = MessageHub.get_instance("test_plain_checkpoint")
    hub.update_scalar("train/loss", 0.75)
    hub.update_scalar("train/loss", np.float32(0.5))
    hub.update_info("best_score", np.float64(0.25))
    hub.update_info("iter", 3)
    return {
        "meta": {"epoch": 1, "dataset_meta": {"classes": ("a", "b"), "palette": np.array([[1, 2, 3]])}},
        "state_dict": model.state_dict(),
        "message_hub": hub.state_dict(),
        "param_schedulers": [{"milestones": Counter({8: 1, 11: 1})}],
    }


def test_what_the_hook_leaves_is_read_by_the_safe_loader_and_is_what_was_there(tmp_path):
    model = nn.Linear(2, 3)
    hook, content = PlainCheckpointHook(), checkpoint(model)
    histories = content["message_hub"]["log_scalars"]
    torch.save(content, tmp_path / "before.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "before.pth")
    hook.before_save_checkpoint(runner(model), content)
    torch.save(content, tmp_path / "after.pth")
    loaded = torch.load(tmp_path / "after.pth", weights_only=True)
    hook.after_load_checkpoint(runner(model), loaded)
    back = loaded["message_hub"]["log_scalars"]["train/loss"]
    assert isinstance(back, HistoryBuffer)
    np.testing.assert_array_equal(back.data[0], histories["train/loss"].data[0])
    np.testing.assert_array_equal(back.data[1], histories["train/loss"].data[1])
    assert back.mean() == 0.625
    assert back.max_length == histories["train/loss"].max_length
    assert loaded["message_hub"]["runtime_info"]["best_score"] == 0.25
    assert loaded["meta"]["dataset_meta"] == {"classes": ("a", "b"), "palette": [[1, 2, 3]]}
    assert loaded["param_schedulers"] == [{"milestones": Counter({8: 1, 11: 1})}]
    MessageHub.get_instance("resumed").load_state_dict(loaded["message_hub"])
    assert MessageHub.get_instance("resumed").get_scalar("train/loss").current() == 0.5


def test_the_model_that_trains_keeps_its_histories():
    content = checkpoint(nn.Linear(2, 3))
    PlainCheckpointHook().before_save_checkpoint(runner(nn.Linear(2, 3)), content)
    assert isinstance(MessageHub.get_instance("test_plain_checkpoint").get_scalar("train/loss"), HistoryBuffer)


def test_a_state_dict_keeps_the_versions_of_its_modules():
    state = nn.BatchNorm2d(2).state_dict()
    assert vars(plain(state, "state_dict")) == vars(state)  # without them, torch loads it as one of an old version


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.arange(3), [0, 1, 2]),
        ((np.int64(1), "a"), (1, "a")),
        (OrderedDict(a=np.bool_(True)), OrderedDict(a=True)),
        (defaultdict(list, a=[np.int8(2)]), {"a": [2]}),
        ({1, 2}, [1, 2]),
        (None, None),
    ],
)
def test_values_become_plain_ones_of_the_same_meaning(value, expected):
    result = plain(value, "x")
    assert result == expected
    assert type(result) is type(expected)


def test_what_has_no_plain_form_is_named_in_a_warning(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    value = slice(1)
    try:
        with caplog.at_level(logging.WARNING):
            assert plain({"a": [value]}, "meta") == {"a": [value]}
    finally:
        logger.removeHandler(caplog.handler)
    check(caplog.text, "meta.a[0]", "slice")


def test_weights_that_fit_are_taken_with_and_without_the_prefix_of_data_parallel_training():
    own = nn.Linear(2, 3).state_dict()
    check_weights(own, own, strict=True)
    check_weights(own, {f"module.{name}": value for name, value in own.items()}, strict=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("head.bias"), ["head.bias"]),
        (lambda s: s.update(extra=torch.zeros(1)), ["extra"]),
        (lambda s: s.update({"head.weight": torch.zeros(5, 2)}), ["head.weight", (5, 2), (3, 2)]),
    ],
)
def test_a_difference_outside_of_the_backbone_ends_a_test_or_a_resumed_run_but_not_a_new_one(change, named):
    own = nn.ModuleDict({"backbone": nn.Linear(4, 2), "head": nn.Linear(2, 3)}).state_dict()
    given = dict(own)
    change(given)
    with raises(ValueError, *named):
        check_weights(own, given, strict=True)
    check_weights(own, given, strict=False)


def test_another_backbone_ends_every_run():
    own = nn.ModuleDict({"backbone": nn.Linear(4, 2)}).state_dict()
    given = nn.ModuleDict({"backbone": nn.Linear(4, 3)}).state_dict()
    with raises(ValueError, "backbone.weight", (3, 4), (2, 4)):
        check_weights(own, given, strict=False)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([1], ["list"]),
        ({"state_dict": None}, ["state_dict", "NoneType"]),
        ({"state_dict": {3: torch.zeros(1)}}, ["state_dict", 3, "Tensor"]),
        ({"state_dict": {"a": 1}}, ["state_dict", "'a'", "int"]),
        ({"state_dict": {}, "meta": None}, ["meta", "NoneType"]),
        ({"state_dict": {}, "meta": {"dataset_meta": 5}}, ["meta.dataset_meta", "int"]),
    ],
)
def test_what_is_no_checkpoint_is_named(content, named, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with raises(ValueError, tmp_path / "a.pth", *named):
        read_checkpoint(tmp_path / "a.pth")


def test_a_folder_is_of_deepspeed_only_if_its_files_are(tmp_path):
    with raises(ValueError, tmp_path) as error:
        read_checkpoint(tmp_path)
    assert "DeepSpeed" not in str(error.value)
    (tmp_path / "mp_rank_00_model_states.pt").write_bytes(b"")
    with raises(ValueError, tmp_path, "DeepSpeed", "model.pth"):
        read_checkpoint(tmp_path)
