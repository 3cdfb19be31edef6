import json
from pathlib import Path

import pytest
import torch

from hatnet_testing import check, raises
from hatnet_train.config import FIELDS, TrainConfig
from hatnet_train.precision import settle_precision
from hatnet_train.recipes import build_config
from hatnet_train.run.checkpoint import write_manifest
from hatnet_train.run.folder import read_config
from hatnet_train.run.state import (
    STATE,
    EngineState,
    RunState,
    Saved,
    check_same_run,
    differences,
    read_saved,
    seed_step,
)

CONFIG = build_config("digits", {"clip_grad": 1.0})
DATA = {"training data": "72 images, 0123", "held-out data": "12 images, 4567"}
SAVED = Saved(
    folder=Path("run/checkpoints/step-0000000005"),
    state=RunState(step=5),
    config=json.loads(json.dumps(CONFIG.to_dict())),
    data=DATA,
    engine=EngineState(0, 0, 0, {}),
    **{name: {} for name in ("scalars", "weights", "average", "moments")},
)


def other(value):
    """Another value that the field may have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return {"strict": "replace", "auto": "plain"}.get(value, "other")
    return value + 1


@pytest.mark.parametrize("name", [name for name, field in FIELDS.items() if field.may_change])
def test_how_a_run_is_computed_may_change_where_it_goes_on(name):
    changed = CONFIG.replace(**{name: other(CONFIG.to_dict()[name]) if name != "zero_stage" else 3})
    check_same_run(SAVED, changed, DATA)


@pytest.mark.parametrize(
    ("name", "value"), [("lr", 0.1), ("batch_size", 64), ("precision", "bf16"), ("seed", 5), ("grid_sizes", [4, 4, 4])]
)
def test_what_a_run_computes_may_not_change(name, value):
    before = SAVED.config[name]
    assert value != before
    flag = "--" + name.replace("_", "-")
    with raises(ValueError, SAVED.folder, flag, before, value):
        check_same_run(SAVED, CONFIG.replace(**{name: value}), DATA)


def test_neither_may_the_images():
    moved = {**DATA, "held-out data": "13 images, 89ab"}
    with raises(ValueError, SAVED.folder, "held-out data", DATA["held-out data"], moved["held-out data"]):
        check_same_run(SAVED, CONFIG, moved)


def test_what_a_step_draws_depends_on_seed_step_and_rank():
    drawn = {}
    for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)]:
        seed_step(*key)
        values = torch.rand(4)
        assert torch.equal(drawn.setdefault(key, values), values)
    assert len({tuple(values.tolist()) for values in drawn.values()}) == 4


RECORD = {
    **{"step": 3, "rows": [{"top1": 1.0}], "skipped": [2], "bad_images": 0, "trained": 1, "loss": 1, "lr": 0.1},
    **{"seconds": 1.0, "waited": 0.0, "config": {"seed": 1}, "data": {"training data": "3 images"}},
    "engine": {"global_steps": 3, "skipped_steps": 0, "scheduler_step": 3, "loss_scaling": {"cur_scale": 2.0}},
    "optimizer": {"step": 3.0},
}


def write_state(folder, record):
    (folder / STATE).write_text(json.dumps(record))
    write_manifest(folder, [STATE], {})


def test_files_that_a_manifest_lacks_are_named(tmp_path):
    write_state(tmp_path, RECORD)
    with raises(ValueError, tmp_path / "model.safetensors", "manifest.json"):
        read_saved(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": -1}, ["step", -1]),
        ({"trained": True}, ["trained", True]),
        ({"loss": "1"}, ["loss", "'1'"]),
        ({"rows": [{}, 3]}, ["rows[1]", 3]),
        ({"skipped": [1.5]}, ["skipped[0]", 1.5]),
        ({"data": []}, ["data", []]),
        ({"optimizer": {"step": 3.0, "beta": None}}, ['optimizer["beta"]', None]),
        ({"engine": {**RECORD["engine"], "global_steps": -3}}, ["engine.global_steps", -3]),
        ({"engine": {"global_steps": 3}}, ["engine.skipped_steps"]),
    ],
)
def test_a_wrong_value_of_the_state_is_named_with_file_and_field(change, named, tmp_path):
    write_state(tmp_path, {**RECORD, **change})
    with raises(ValueError, tmp_path / STATE, *named):
        read_saved(tmp_path)


@pytest.mark.parametrize("name", RECORD)
def test_every_value_of_the_state_is_needed(name, tmp_path):
    write_state(tmp_path, {key: value for key, value in RECORD.items() if key != name})
    with raises(ValueError, tmp_path / STATE, name):
        read_saved(tmp_path)


OLD_RUNS = {
    "digits": {"epochs": 2, "checkpoint_steps": 10, "keep_checkpoints": 20},
    "mixed": {"epochs": 1, "mixup": 0.8, "cutmix": 1.0, "batch_size": 64, "ema_decay": 0.99, "zero_stage": 1}
    | {"checkpoint_steps": 10, "keep_checkpoints": 20},
}
"""Run folders written before the options were declared in groups, without their tensors, and how they were started."""


@pytest.mark.parametrize("name", OLD_RUNS)
def test_a_run_of_before_resumes_with_the_options_it_was_started_with(name):
    folder = Path(__file__).parent / "data" / name
    record = read_config(folder / "config.json")
    state = json.loads((folder / "checkpoints" / "step-0000000010" / "state.json").read_text())
    config = build_config("digits", OLD_RUNS[name])
    assert TrainConfig.from_dict(record["config"]) == TrainConfig.from_dict(state["config"]) == config
    assert differences(state["config"], state["data"], config.to_dict(), state["data"]) == ""
    assert "--lr" in differences(state["config"], {}, config.replace(lr=1.0).to_dict(), {})


@pytest.mark.parametrize(("name", "value"), [("epochs", 9), ("max_steps", 90)])
def test_a_run_may_become_longer_but_not_shorter(name, value):
    then = CONFIG.replace(**{name: value})
    record = json.loads(json.dumps(then.to_dict()))
    assert not differences(record, {}, then.replace(**{name: value + 3}).to_dict(), {})
    shorter = differences(record, {}, then.replace(**{name: value - 1}).to_dict(), {})
    check(shorter, "--" + name.replace("_", "-"), value, value - 1)


def test_a_limit_of_steps_may_be_lifted_but_not_set():
    limited = CONFIG.replace(max_steps=90).to_dict()
    assert not differences(limited, {}, CONFIG.to_dict(), {})
    check(differences(CONFIG.to_dict(), {}, limited, {}), "--max-steps", 0, 90)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_resumes_in_its_precision_where_none_is_given(precision):
    then = {**CONFIG.to_dict(), "precision": precision}
    assert not differences(then, {}, CONFIG.replace(precision="auto").to_dict(), {})
    assert settle_precision(CONFIG.replace(precision="auto"), then).compute.precision == precision
    assert settle_precision(CONFIG.replace(precision="fp16"), then).compute.precision == "fp16"
