"""Images that cannot be read: the run ends with their path, or another one takes their place."""

import shutil

import pytest
from runs import rows

from hatnet_testing import check, error_line
from launches import lines_naming


@pytest.fixture(scope="module")
def damaged(images, tmp_path_factory):
    """The images with damage: two of those to train with, one of those held out."""
    root = tmp_path_factory.mktemp("damaged") / "images"
    shutil.copytree(images, root)
    for name in ("train/class1/3.jpg", "val/class2/1.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:500])
    (root / "train/class2/7.jpg").write_bytes(b"")
    return root


@pytest.fixture
def flags(everything, damaged):
    """Arguments of a run of an epoch over the damaged images."""
    return [*everything, "--drop-rate", "0", "--drop-path-rate", "0", "--data", damaged, "--epochs", "1"]


def test_a_damaged_image_ends_the_run_with_its_path(train, flags, damaged, tmp_path):
    log = train(*flags, "--out", tmp_path / "run", ranks=1, expected=1)
    error = error_line(log, "hatnet-train")
    assert any(str(damaged / name) in error for name in ("train/class1/3.jpg", "train/class2/7.jpg"))
    assert "Traceback" not in log


@pytest.mark.slow
def test_the_other_process_says_which_image_it_was(launch, flags, damaged, tmp_path):
    """With two processes, the images of rank 1 are among those that cannot be read."""
    only = tmp_path / "images"
    shutil.copytree(damaged, only)
    for image in (only / "train").glob("*/*"):
        image.write_bytes(b"no image")
    with launch([*flags, "--data", only, "--out", tmp_path / "run"]) as started:
        assert started.wait() == [1, 1], started.text()
        assert "Traceback" not in started.text()
        for rank in (0, 1):
            error_line(started.log(rank), "hatnet-train", only / "train")


def test_no_held_out_image_that_can_be_read_is_said(train, flags, damaged, tmp_path):
    only = tmp_path / "images"
    shutil.copytree(damaged, only)
    for image in (only / "val").glob("*/*"):
        image.write_bytes(b"no image")
    log = train(*flags, "--data", only, "--on-bad-image", "replace", "--out", tmp_path / "run", ranks=1, expected=1)
    error_line(log, "hatnet-train", "held-out images")


def test_damaged_images_are_replaced_and_counted_alike_on_any_number_of_processes(train, flags, damaged, tmp_path):
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        log = train(*flags, "--on-bad-image", "replace", "--workers", 2 - ranks, "--out", out, ranks=ranks)
        for name in ("train/class1/3.jpg", "train/class2/7.jpg", "val/class2/1.jpg"):
            assert len(lines_naming(log, "hatnet-train: warning: ", damaged / name)) == 1
    (one,), (two,) = rows(tmp_path / "1"), rows(tmp_path / "2")
    assert one["bad_images"] == two["bad_images"] == 3
    assert one["eval_images"] == two["eval_images"] == 11
    assert one["train_loss"] == pytest.approx(two["train_loss"], rel=1e-4)


@pytest.mark.slow
def test_more_damaged_images_than_allowed_end_the_run(train, flags, tmp_path):
    bound = ["--on-bad-image", "replace", "--max-bad-images", "2", "--out", tmp_path / "run"]
    log = train(*flags, *bound, expected=1)
    check(lines_naming(log, "hatnet-train: error: ")[0], 3, "epoch 1", "step 3", "--max-bad-images", 2)
    assert "Traceback" not in log
