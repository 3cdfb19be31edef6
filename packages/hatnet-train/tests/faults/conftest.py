"""Shared by the tests of faults."""

from pathlib import Path

import pytest

from image_folders import draw_coloured_images


def pytest_collection_modifyitems(items):
    """Mark all tests of this folder ``long``."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.long)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An ImageNet-layout folder of 3 classes that differ in colour: 72 images to train with, 12 held out."""
    root = tmp_path_factory.mktemp("images")
    draw_coloured_images(root, classes=3, train=24, val=4)
    return root


@pytest.fixture(scope="session")
def everything(images):
    """Arguments of a run of 9 steps in 3 epochs with all that draws at random, or keeps a state."""
    data = ["--recipe", "digits", "--data", images, "--epochs", "3", "--batch-size", "24", "--lr", "3e-4"]
    draws = ["--mixup", "0.8", "--cutmix", "1", "--rand-augment", "rand-m9-mstd0.5", "--random-erasing", "0.25"]
    model = ["--drop-rate", "0.1", "--drop-path-rate", "0.1", "--ema-decay", "0.9", "--clip-grad", "1"]
    return [*data, *draws, *model, "--accumulation", "2", "--workers", "1", "--seed", "7"]


@pytest.fixture(scope="session")
def whole(launch, everything, tmp_path_factory):
    """The run folder of a run at a ZeRO stage that nothing interrupts."""
    folders = {}

    def of(stage):
        if stage not in folders:
            out = folders[stage] = tmp_path_factory.mktemp("whole") / "run"
            with launch(
                [*everything, "--zero-stage", stage, "--out", out], module="faulty", function="open_to_all"
            ) as started:
                assert started.wait() == [0, 0], started.text()
        return folders[stage]

    return of


@pytest.fixture(scope="session")
def still(train, everything, tmp_path_factory):
    """A run with ZeRO-1 without what draws in every process; all its checkpoints are kept."""
    out = tmp_path_factory.mktemp("still") / "run"
    flags = ["--drop-rate", "0", "--drop-path-rate", "0", "--checkpoint-steps", "5", "--keep-checkpoints", "9"]
    train(*everything, *flags, "--zero-stage", "1", "--out", out)
    return out
