import dataclasses

import pytest

from hatnet_testing import raises
from hatnet_train import TrainConfig, build_config


def test_every_field_says_what_it_is():
    assert all(len(field.metadata["help"]) > 15 for field in dataclasses.fields(TrainConfig))


def test_the_rate_is_scaled_linearly_with_the_batch_where_a_batch_is_given_for_it():
    values = {"data": "synthetic", "lr": 1e-3, "lr_batch_size": 1024}
    assert build_config("imagenet", {**values, "batch_size": 4096}).peak_lr == pytest.approx(4e-3)
    assert build_config("imagenet", {**values, "batch_size": 256}).peak_lr == pytest.approx(2.5e-4)
    assert build_config("imagenet", {**values, "batch_size": 256, "lr_batch_size": 0}).peak_lr == 1e-3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", "resnet50"),
        ("image_size", 31),
        ("image_size", 4096),
        ("grid_sizes", (8, 0, 8)),
        ("pool_sizes", (-1, 4, 2)),
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr_batch_size", -1),
        ("min_lr", 1e-3),
        ("warmup_epochs", 7.0),
        ("weight_decay", -0.1),
        ("clip_grad", -1.0),
        ("ema_decay", 1.0),
        ("label_smoothing", 1.0),
        ("drop_path_rate", 1.0),
        ("drop_rate", -0.5),
        ("min_scale", 0.0),
        ("max_shift", 32),
        ("hflip", 1.5),
        ("random_erasing", -0.1),
        ("repeats", 0),
        ("mixup", -1.0),
        ("cutmix", float("inf")),
        ("crop_fraction", 0.0),
        ("precision", "fp8"),
        ("zero_stage", 4),
        ("accumulation", 0),
        ("workers", -1),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with raises(ValueError, field, value):
        build_config("digits", {field: value})


def test_a_bound_that_is_another_field_is_named():
    for given, named in (
        ({"min_lr": 1e-3}, "lr=0.0001"),
        ({"warmup_epochs": 7.0}, "epochs=7"),
        ({"max_shift": 32}, "image_size=32"),
        ({"max_shift": 2, "min_scale": 0.5}, "min_scale"),
    ):
        with raises(ValueError, *next(iter(given.items())), named):
            build_config("digits", given)


def test_every_field_that_has_a_range_is_checked():
    checked = TrainConfig._model_checks, TrainConfig._run_checks, TrainConfig._data_checks
    config = build_config("digits", {})
    names = {name for checks in checked for name in checks(config)}
    unchecked = {field.name for field in dataclasses.fields(TrainConfig)} - names
    switches = {"activation_checkpointing", "compile", "deterministic"}
    assert unchecked == {"init", "rand_augment", *switches}  # no range, or others' words
