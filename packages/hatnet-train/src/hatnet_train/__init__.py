"""Train HAT-Net with DeepSpeed, from one process to many."""

from hatnet_train import _moved
from hatnet_train.__about__ import __version__
from hatnet_train.config import TrainConfig
from hatnet_train.recipes import RECIPES, build_config

__all__ = ["RECIPES", "TrainConfig", "__version__", "build_config"]

_moved.install()
