import dataclasses

import pytest

from hatnet_train import TrainConfig, build_config


def test_every_field_says_what_it_is():
    assert all(len(field.metadata["help"]) > 15 for field in dataclasses.fields(TrainConfig))


def test_the_rate_is_scaled_linearly_with_the_batch_where_a_batch_is_given_for_it():
    values = {"data": "synthetic", "lr": 1e-3, "lr_batch_size": 1024}
    assert build_config("imagenet", {**values, "batch_size": 4096}).peak_lr == pytest.approx(4e-3)
    assert build_config("imagenet", {**values, "batch_size": 256}).peak_lr == pytest.approx(2.5e-4)
    assert build_config("imagenet", {**values, "batch_size": 256, "lr_batch_size": 0}).peak_lr == 1e-3


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("variant", "resnet50", "variant must be one of hatnet_tiny, .* got resnet50"),
        ("image_size", 31, "image_size must be from 32 to 2048 pixels, got 31"),
        ("image_size", 4096, "image_size must be from 32 to 2048 pixels, got 4096"),
        ("grid_sizes", (8, 0, 8), r"grid_sizes must be three positive numbers, got \(8, 0, 8\)"),
        ("pool_sizes", (-1, 4, 2), r"pool_sizes must be three positive numbers, got \(-1, 4, 2\)"),
        ("epochs", 0, "epochs must be from 1 to 1000000, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("lr", 0.0, "lr must be positive and finite, got 0.0"),
        ("lr", float("nan"), "lr must be positive and finite, got nan"),
        ("lr_batch_size", -1, "lr_batch_size must be 0 or positive, got -1"),
        ("min_lr", 1e-3, "min_lr must be from 0 to lr=0.0001, got 0.001"),
        ("warmup_epochs", 7.0, "warmup_epochs must be from 0 to below epochs=7, got 7.0"),
        ("weight_decay", -0.1, "weight_decay must be 0 or positive, got -0.1"),
        ("clip_grad", -1.0, "clip_grad must be 0 or positive, got -1.0"),
        ("ema_decay", 1.0, r"ema_decay must be in \[0, 1\), got 1.0"),
        ("label_smoothing", 1.0, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ("drop_path_rate", 1.0, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ("drop_rate", -0.5, r"drop_rate must be in \[0, 1\), got -0.5"),
        ("min_scale", 0.0, r"min_scale must be in \(0, 1\], got 0.0"),
        ("min_scale", 0.5, "max_shift must be .* 0 with random crops .*, got 2"),
        ("max_shift", 32, "max_shift must be from 0 to below image_size=32.* got 32"),
        ("hflip", 1.5, r"hflip must be in \[0, 1\], got 1.5"),
        ("random_erasing", -0.1, r"random_erasing must be in \[0, 1\], got -0.1"),
        ("repeats", 0, "repeats must be at least 1, got 0"),
        ("mixup", -1.0, "mixup must be 0 or positive, got -1.0"),
        ("cutmix", float("inf"), "cutmix must be 0 or positive, got inf"),
        ("crop_fraction", 0.0, r"crop_fraction must be in \(0, 1\], got 0.0"),
        ("precision", "fp8", "precision must be one of bf16, fp16, fp32, got fp8"),
        ("zero_stage", 4, "zero_stage must be from 0 to 3, got 4"),
        ("accumulation", 0, "accumulation must be at least 1, got 0"),
        ("workers", -1, "workers must be from 0 to 1024, got -1"),
        ("seed", -1, "seed must be from 0 .* got -1"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, expected):
    with pytest.raises(ValueError, match=expected):
        build_config("digits", {field: value})


def test_every_field_that_has_a_range_is_checked():
    checked = TrainConfig._model_checks, TrainConfig._run_checks, TrainConfig._data_checks
    config = build_config("digits", {})
    names = {name for checks in checked for name in checks(config)}
    unchecked = {field.name for field in dataclasses.fields(TrainConfig)} - names
    switches = {"activation_checkpointing", "compile", "deterministic"}
    assert unchecked == {"init", "rand_augment", *switches}  # no range, or others' words
