import pytest
import torch

from hatnet_core import create_model
from hatnet_testing import raises
from hatnet_train import RECIPES, build_config

DATA = {"data": "synthetic", "init": "weights.safetensors"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_builds_with_a_model_that_exists(recipe):
    config = build_config(recipe, {} if recipe == "digits" else DATA)
    with torch.device("meta"):
        assert create_model(config.model.variant).num_classes == 1000


def test_imagenet_is_the_papers_section_4_1():
    config = build_config("imagenet", DATA)
    assert (
        config.model.variant,
        config.images.image_size,
        config.optimisation.epochs,
        config.optimisation.batch_size,
    ) == ("hatnet_small", 224, 300, 8 * 128)
    assert (config.peak_lr, config.optimisation.weight_decay) == (1e-3, 0.05)
    assert config.augmentation.hflip == 0.5
    assert config.augmentation.mixup > 0
    assert config.augmentation.label_smoothing == 0.1
    assert round(config.images.image_size / config.images.crop_fraction) == 256


def test_an_ablation_has_100_epochs_and_half_the_batch_and_rate():
    full, ablation = build_config("imagenet", DATA), build_config("ablation", DATA)
    assert ablation.optimisation.epochs == 100
    assert ablation.optimisation.batch_size == full.optimisation.batch_size / 2
    assert ablation.peak_lr == full.peak_lr / 2


def test_the_rows_of_table_5_have_windows_where_the_paper_has_no_tick():
    windows = [
        RECIPES[f"window-ablation-{row}"]["variant"].removeprefix("hatnet_small").removeprefix("_window")
        for row in (1, 2, 3, 4)
    ]
    assert windows == ["234", "34", "4", ""]


def test_gelu_is_trained_as_long_as_the_full_model_and_no_depthwise_as_the_ablations():
    assert build_config("gelu", DATA).optimisation.epochs == 300
    assert build_config("no-depthwise", DATA).optimisation.epochs == 100


@pytest.mark.parametrize(
    ("variant", "rate"),
    [("hatnet_tiny", 0.1), ("hatnet_small", 0.1), ("hatnet_small_gelu", 0.1), ("hatnet_large", 0.3)],
)
def test_stochastic_depth_goes_with_the_variant_unless_given(variant, rate):
    assert build_config("imagenet", {**DATA, "variant": variant}).model.drop_path_rate == rate
    assert build_config("imagenet", {**DATA, "variant": variant, "drop_path_rate": 0.0}).model.drop_path_rate == 0.0


def test_overrides_go_over_the_recipe():
    config = build_config("digits", {"variant": "hatnet_small", "lr": 2e-5})
    assert (config.model.variant, config.optimisation.lr, config.optimisation.batch_size) == ("hatnet_small", 2e-5, 32)


def test_warmup_keeps_its_share_of_other_epochs_unless_given():
    assert build_config("digits", {"epochs": 3}).optimisation.warmup_epochs == pytest.approx(0.9)
    assert build_config("digits", {"epochs": 3, "warmup_epochs": 1.0}).optimisation.warmup_epochs == 1.0


def test_an_unknown_recipe_is_refused_with_the_known_ones():
    with raises(ValueError, "recipe", "'imagnet'", *RECIPES):
        build_config("imagnet", {})


@pytest.mark.parametrize(("recipe", "given", "missing"), [("imagenet", {}, "data"), ("finetune-384", DATA, "init")])
def test_a_recipe_without_what_it_needs_is_refused(recipe, given, missing):
    given = {name: value for name, value in given.items() if name != missing}
    with raises(ValueError, recipe, missing):
        build_config(recipe, given)


@pytest.mark.parametrize("images", [2, 10, 100, 1_000, 20_000, 100_000, 2_000_000])
def test_finetune_fits_batch_epochs_warm_up_and_average_to_the_number_of_images(images):
    options = build_config("finetune", {"data": "x"}, images=images).optimisation
    steps = images // options.batch_size * options.epochs
    assert options.batch_size <= max(1, images // 4)
    assert options.batch_size & (options.batch_size - 1) == 0  # divides among 2, 4 and 8 processes
    assert options.warmup_epochs == options.epochs / 10
    assert 3 <= options.early_stopping < options.epochs
    if images >= 100:
        assert 1 / (1 - options.ema_decay) == pytest.approx(steps / 20, rel=0.1)


def test_finetune_trains_longer_on_more_images_and_passes_over_fewer_of_them_more_often():
    runs = [
        build_config("finetune", {"data": "x"}, images=images).optimisation for images in (100, 1_000, 10_000, 10**5)
    ]
    epochs = [run.epochs for run in runs]
    steps = [
        images // run.batch_size * run.epochs for images, run in zip((100, 1_000, 10_000, 10**5), runs, strict=True)
    ]
    assert epochs == sorted(epochs, reverse=True)
    assert steps == sorted(steps)


def test_what_follows_the_images_follows_values_that_are_given():
    given = {"data": "x", "epochs": 20, "batch_size": 25, "early_stopping": 0}
    options = build_config("finetune", given, images=1_000).optimisation
    assert (options.warmup_epochs, options.early_stopping) == (2.0, 0)
    assert options.ema_decay == pytest.approx(1 - 20 / (20 * 40))
    assert build_config("finetune", {**given, "max_steps": 400}, images=1_000).optimisation.ema_decay == 0.95


def test_without_weights_all_layers_learn_at_one_rate():
    released = build_config("finetune", {"data": "x"})
    assert (released.model.init, released.optimisation.layer_decay < 1) == ("released", True)
    fresh = build_config("finetune", {"data": "x", "init": "none"})
    assert (fresh.initial_weights, fresh.optimisation.layer_decay) == ("", 1.0)
