import dataclasses

import pytest

from hatnet_train import RECIPES, TrainConfig, build_config


def test_every_recipe_builds_and_every_field_says_what_it_is():
    for recipe in RECIPES:
        build_config(recipe, {})
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainConfig))


def test_overrides_go_over_the_recipe():
    config = build_config("digits", {"variant": "hatnet_small", "lr": 2e-5})
    assert (config.variant, config.lr, config.batch_size) == ("hatnet_small", 2e-5, 32)


def test_warmup_keeps_its_share_of_other_epochs_unless_given():
    assert build_config("digits", {"epochs": 3}).warmup_epochs == pytest.approx(0.9)
    assert build_config("digits", {"epochs": 3, "warmup_epochs": 1.0}).warmup_epochs == 1.0


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown recipe 'imagnet'; known recipes: digits"):
        build_config("imagnet", {})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("variant", "resnet50", "variant must be one of hatnet_tiny, .* got resnet50"),
        ("image_size", 31, "image_size must be from 32 to 2048 pixels, got 31"),
        ("image_size", 4096, "image_size must be from 32 to 2048 pixels, got 4096"),
        ("epochs", 0, "epochs must be from 1 to 1000000, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("lr", 0.0, "lr must be positive, got 0.0"),
        ("lr", float("nan"), "lr must be positive, got nan"),
        ("warmup_epochs", 7.0, "warmup_epochs must be from 0 to below epochs=7, got 7.0"),
        ("weight_decay", -0.1, "weight_decay must be 0 or positive, got -0.1"),
        ("label_smoothing", 1.0, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ("drop_path_rate", 1.0, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ("max_shift", 32, "max_shift must be from 0 to below image_size=32, got 32"),
        ("seed", -1, "seed must be from 0 .* got -1"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value, expected):
    with pytest.raises(ValueError, match=expected):
        build_config("digits", {field: value})
