import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch

from conftest import SMALL
from hatnet_core import HATNet, HATNetConfig, create_model
from hatnet_testing import raises


def test_attributes_and_mapping_hold_the_same_values():
    config = HATNetConfig(**SMALL, num_classes=5)
    assert dict(config) == {name: getattr(config, name) for name in config}
    assert (config.embed_dims, config["grid_sizes"], config.num_classes) == ((8, 16, 16, 24), (8, 7, 7), 5)
    assert "no_such" not in config
    with raises(KeyError, "no_such"):
        config["no_such"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: c.replace()])
def test_a_copy_builds_the_same_model(copied):
    model = HATNet(**SMALL, num_classes=5)
    config = copied(model.config)
    assert config == model.config == dict(model.config)
    assert {n: p.shape for n, p in HATNet(**config).state_dict().items()} == {
        n: p.shape for n, p in model.state_dict().items()
    }


def test_json_gives_the_arguments_back():
    config = create_model("hatnet_tiny", num_classes=7).config
    assert HATNetConfig(**json.loads(config.to_json_string())) == config
    assert HATNetConfig(**config.to_dict()) == config


def test_a_foreign_attribute_is_taken_and_not_saved():
    config = HATNetConfig(**SMALL)
    before = config.to_json_string()
    config.use_cache = False
    assert config.use_cache is False
    assert config.to_json_string() == before
    assert "use_cache" not in config


@pytest.mark.parametrize("name", ["num_classes", "grid_sizes", "embed_dims"])
def test_an_argument_of_a_built_model_is_not_assigned(name):
    model = HATNet(**SMALL)
    before = dict(model.config)
    with raises(AttributeError, name, "set_grid()", "reset_classifier()", 3):
        setattr(model.config, name, 3)
    assert model.config == before


def test_the_signature_of_the_model_is_that_of_the_configuration():
    import inspect

    assert list(inspect.signature(HATNet).parameters) == list(HATNetConfig(**SMALL))
    assert inspect.signature(HATNet).parameters["drop_rate"].default == 0.2


def test_the_configuration_needs_no_torch():
    program = "import sys, hatnet_core.config; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_integers_of_tensors_become_plain(tmp_path):
    config = HATNetConfig(**{**SMALL, "depths": [torch.tensor(n) for n in (1, 2, 1, 1)]}, num_classes=torch.tensor(5))
    assert json.loads(config.to_json_string())["depths"] == [1, 2, 1, 1]
    assert type(config.num_classes) is int
