import logging

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hatnet_analysis import Count, count_flops, count_params
from hatnet_core import HATNet, create_model

PARTS = ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]
SMALL = {"embed_dims": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "head_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


def dispatched_products(model, height, width):
    """Multiply-adds of all matrix products and convolutions that torch dispatches."""
    image = torch.zeros(1, 3, height, width, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.to("meta")(image)
    return counter.get_total_flops() / 2


def normalised_values(model, height, width):
    """How many values pass through the normalisations of the model."""
    values = []
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda module, inputs, output: values.append(output.numel()))
    model.to("meta")(torch.zeros(1, 3, height, width, device="meta"))
    return sum(values)


@pytest.mark.parametrize(
    ("name", "table_2", "complete"),
    [
        ("hatnet_tiny", 2.0, 2.15),
        ("hatnet_small", 4.3, 4.58),
        ("hatnet_medium", 8.3, 8.83),
        ("hatnet_large", 11.5, 12.14),
    ],
)
def test_the_paper_convention_reproduces_table_2(name, table_2, complete):
    flops = count_flops(create_model(name), 224, 224)
    assert round(flops.total.paper / 1e9, 1) == table_2
    assert round(flops.total.complete / 1e9, 2) == complete
    assert list(flops.stages) == PARTS
    assert sum(part.paper for part in flops.stages.values()) == flops.total.paper
    assert sum(part.complete for part in flops.stages.values()) == flops.total.complete


def test_the_ablations_count_as_their_definitions_say():
    small, gelu, pure, windows = (
        count_flops(create_model(name, num_classes=5), 64, 96).total
        for name in ("hatnet_small", "hatnet_small_gelu", "hatnet_small_no_depthwise", "hatnet_small_window234")
    )
    assert gelu == small
    # a 3×3 depthwise convolution for each of the E·C channels at every position of stages 2-5
    stages = [(8 * 64, 2, 16 * 24), (8 * 128, 3, 8 * 12), (4 * 320, 8, 4 * 6), (4 * 512, 3, 2 * 3)]
    depthwise = sum(9 * channels * blocks * positions for channels, blocks, positions in stages)
    assert small.complete - pure.complete == small.paper - pure.paper == depthwise
    assert windows.paper < small.paper  # neither q, k and v of the pooled map nor its norms


@pytest.mark.parametrize("attention", [("hierarchical",) * 3, ("window",) * 3])
@pytest.mark.parametrize("size", [(64, 96), (37, 50)])
def test_the_complete_count_is_every_product_torch_dispatches_and_five_a_normalised_value(size, attention):
    model = HATNet(**SMALL, attention=attention, num_classes=5)
    flops = count_flops(model, *size)
    products = dispatched_products(model, *size)
    assert flops.total.complete == products + 5 * normalised_values(model, *size)


def test_attention_products_are_in_the_stages_and_in_no_other_part():
    stages = count_flops(HATNet(**SMALL), 64, 64).stages
    with_products = [part for part, count in stages.items() if count.complete > count.paper]
    assert with_products == ["stages.0", "stages.1", "stages.2", "stages.3"]


def test_the_head_counts_one_multiply_add_a_weight():
    assert count_flops(HATNet(**SMALL, num_classes=5), 32, 32).stages["head"] == Count(paper=24 * 5, complete=24 * 5)
    assert count_flops(HATNet(**SMALL, num_classes=0), 32, 32).stages["head"] == Count(paper=0, complete=0)


def test_a_model_in_training_counts_the_same_and_keeps_its_modes():
    model = HATNet(**SMALL, drop_path_rate=0.5, proj_drop_rate=0.1).train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    assert count_flops(model, 64, 64) == count_flops(HATNet(**SMALL), 64, 64)
    assert [module.training for module in model.modules()] == modes


def test_images_of_the_models_own_channels_and_dtype_are_counted():
    one_channel = count_flops(HATNet(**SMALL, in_chans=1).double(), 32, 32)
    three_channels = count_flops(HATNet(**SMALL, in_chans=3), 32, 32)
    positions, weights = 16 * 16, 3 * 3 * 16
    assert three_channels.total.paper - one_channel.total.paper == 2 * positions * weights


class FusedProduct(nn.Module):
    """A matrix product in an operator that fvcore does not count."""

    def forward(self, x):
        return torch.baddbmm(x[0], x[0], x[0].transpose(1, 2) @ x[0])[None]


class OwnOperator(nn.Module):
    """A matrix product inside a function of one's own, which a trace shows as one opaque operator."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ x.transpose(-2, -1) @ x

    def forward(self, x):
        return self.Product.apply(x)


@pytest.mark.parametrize(
    ("layer", "operator"), [(FusedProduct(), "aten::baddbmm"), (OwnOperator(), "prim::PythonOp.Product")]
)
def test_an_operator_that_cannot_be_counted_is_refused_by_name(layer, operator):
    model = HATNet(**SMALL)
    model.stages[1].blocks[0].attn = layer
    with pytest.raises(ValueError, match=f"cannot count {operator}: expected operators that fvcore counts"):
        count_flops(model, 64, 64)


@pytest.mark.parametrize(("height", "width"), [(31, 64), (64, 16), (0, 0)])
def test_an_image_below_32_pixels_is_refused_with_its_size(height, width):
    with pytest.raises(ValueError, match=f"height and width must be at least 32 pixels, got {height}×{width}"):
        count_flops(HATNet(**SMALL), height, width)


def test_counting_logs_nothing(caplog):
    with caplog.at_level(logging.DEBUG):
        count_flops(HATNet(**SMALL), 37, 50)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "millions"),
    [("hatnet_tiny", 12.7), ("hatnet_small", 25.7), ("hatnet_medium", 42.9), ("hatnet_large", 63.1)],
)
def test_parameter_counts_are_those_of_table_1(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert round(count_params(model) / 1e6, 1) == millions


def test_a_shared_parameter_counts_once():
    layer = nn.Linear(3, 4)
    assert count_params(nn.Sequential(layer, layer)) == 3 * 4 + 4
