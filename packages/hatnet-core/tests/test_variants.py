import pytest

from hatnet_core import create_model, list_models


def test_the_four_variants_of_the_paper_are_listed_by_size():
    assert list_models() == ["hatnet_tiny", "hatnet_small", "hatnet_medium", "hatnet_large"]


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'hatnet_huge'; known models: hatnet_tiny, hatnet_small"):
        create_model("hatnet_huge")


def test_arguments_reach_the_model_over_those_of_the_variant():
    model = create_model("hatnet_tiny", num_classes=7, in_chans=1, grid_sizes=(8, 8, 8))
    assert model.get_classifier().out_features == 7
    assert model.config["in_chans"] == 1
    assert model.config["grid_sizes"] == (8, 8, 8)
    assert model.config["head_dim"] == 48
