"""The strategy replaces one function of MMEngine; this file notices when that changes or is no longer necessary."""

import importlib.metadata

import pytest
from mmengine._strategy import deepspeed as upstream
from mmengine.registry import STRATEGIES

from hatnet_dense import ZeroStrategy


def test_the_base_is_the_strategy_that_configs_name():
    assert ZeroStrategy.__bases__ == (STRATEGIES.get("DeepSpeedStrategy"),)


@pytest.mark.skipif("onedl" in str(importlib.metadata.packages_distributions()["mmengine"]), reason="forks may differ")
def test_the_replaced_function_still_imports_optimizers_that_deepspeed_has_removed():
    with pytest.raises(ImportError):
        upstream.register_deepspeed_optimizers()


def test_the_strategy_is_built_without_them():
    strategy = ZeroStrategy(zero_optimization={"stage": 2}, train_micro_batch_size_per_gpu=2)
    assert strategy.config["zero_optimization"] == {"stage": 2}
