"""ZeRO's partition of the parameters, as we read it and as DeepSpeed's public functions report it."""

import json

import pytest

from image_folders import draw_coloured_images

pytestmark = pytest.mark.long


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_gathered_tensors_are_those_of_deepspeeds_public_functions(stage, launch, tmp_path):
    """It fails when DeepSpeed changes the private layout that ``partition.py`` reads."""
    draw_coloured_images(tmp_path / "images", classes=2, train=8, val=2)
    run = ["--recipe", "digits", "--data", tmp_path / "images", "--epochs", "1", "--batch-size", "8"]
    arguments = [*run, "--zero-stage", stage, "--out", tmp_path / "run"]
    with launch(arguments, module="probes", function="compare_partitions") as started:
        assert started.wait() == [0, 0], started.text()
    one, two = (json.loads((tmp_path / "run" / f"partitions-{rank}.json").read_text()) for rank in (0, 1))
    assert one["different"] == two["different"] == []
    assert one["weights"] == two["weights"] > 100
    assert (one["moments"], two["moments"]) == (2 * one["weights"], 0)  # those of the rank that writes
