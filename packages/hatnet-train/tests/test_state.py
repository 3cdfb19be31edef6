import json
from pathlib import Path

import pytest
import torch

from hatnet_testing import raises
from hatnet_train.config import FIELDS, TrainConfig
from hatnet_train.recipes import build_config
from hatnet_train.state import RunState, Saved, check_same_run, differences, seed_step
from hatnet_train.verify import read_config

CONFIG = build_config("digits", {"clip_grad": 1.0})
DATA = {"training data": "72 images, 0123", "held-out data": "12 images, 4567"}
SAVED = Saved(
    folder=Path("run/checkpoints/step-0000000005"),
    state=RunState(step=5),
    config=CONFIG.to_dict(),
    data=DATA,
    **{name: {} for name in ("engine", "scalars", "weights", "average", "moments")},
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
    before = CONFIG.to_dict()[name]
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
