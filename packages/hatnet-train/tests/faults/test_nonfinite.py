"""A loss or gradient that is not finite: nothing of it reaches the weights."""

import json
import re

import pytest
from faulty import INFINITE, NOT_A_NUMBER
from runs import assert_same_bits

from hatnet_testing import check
from launches import lines_naming

EPOCH = 3  # steps


@pytest.mark.parametrize(
    "stage", [0, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_steps_that_are_not_finite_are_written_down_and_left_out(stage, launch, everything, images, tmp_path):
    flags = ["--checkpoint-steps", "2", "--zero-stage", stage]
    with launch([*everything, *flags, "--out", tmp_path / "run"], module="faulty", function="not_finite") as started:
        assert started.wait() == [0, 0], started.text()
        log = started.log(0)
    for step, back, loss in ((NOT_A_NUMBER, 4, "nan"), (INFINITE, 6, "")):
        (warning,) = lines_naming(log, "warning", f"nonfinite/step-{step:010d}", loss)
        assert re.findall(r"step (\d+)", warning) == [str(step), str(back)]
    reference = tmp_path / "reference"
    arguments = [*everything, *flags, "--out", reference]
    with launch(arguments, module="faulty", function="without_those_steps") as started:
        assert started.wait() == [0, 0], started.text()
    assert_same_bits(tmp_path / "run", reference)
    for step in (NOT_A_NUMBER, INFINITE):
        folder = tmp_path / "run" / "nonfinite" / f"step-{step:010d}"
        dumps = [json.loads((folder / f"rank-{rank:04d}.json").read_text()) for rank in (0, 1)]
        names = [image["image"] for dump in dumps for image in dump["images"]]
        assert len(set(names)) == 24
        assert all((images / "train" / name).is_file() or (images / name).is_file() for name in names)
        assert {image["label"] for dump in dumps for image in dump["images"]} == {"class0", "class1", "class2"}
        assert [dump["generators"] for dump in dumps] == [
            {"seed": 7, "epoch": step // EPOCH, "step": step, "rank": rank} for rank in (0, 1)
        ]
        assert all(dump["weights"]["not_finite"] == 0 for dump in dumps)
        assert sum(dump["gradients"]["not_finite"] for dump in dumps) > 0
    losses = [dump["losses"] for dump in dumps]
    assert all(isinstance(loss, float) and 0 < loss < 20 for ranks in losses for loss in ranks)
    first = tmp_path / "run" / "nonfinite" / f"step-{NOT_A_NUMBER:010d}" / "rank-0001.json"
    assert json.loads(first.read_text())["losses"] == ["nan", "nan"]


@pytest.mark.slow
def test_a_run_that_diverges_stops_when_the_limit_is_reached(train, everything, tmp_path):
    flags = ["--lr", "1e30", "--clip-grad", "0", "--max-skipped-steps", "1"]
    log = train(*everything, *flags, "--out", tmp_path / "run", expected=1)
    errors = lines_naming(log, "hatnet-train: error: ")
    assert 1 <= len(errors) <= 2
    for error in errors:
        check(error, "--max-skipped-steps", 1, "--lr")
    assert "Traceback" not in log
