import logging

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hatnet_analysis import Count, count_flops, count_params, h_mhsa_macs, mhsa_macs
from hatnet_analysis.flops import example_image, trace
from hatnet_analysis.models import load_model
from hatnet_core import HATNet, create_model
from hatnet_core.flop_handles import ACTIVATION_PRODUCTS
from hatnet_testing import raises

PARTS = ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "head"]
SMALL = {"embed_dims": (8, 16, 16, 24), "depths": (1, 2, 1, 1), "head_dim": 8, "mlp_ratios": (2, 2, 2, 2)}


def dispatched_products(model, height, width):
    """Multiply-adds of all matrix products and convolutions that torch dispatches."""
    image = torch.zeros(1, 3, height, width, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.to("meta")(image)
    return counter.get_total_flops() / 2


def closed_form(config, height, width):
    """Multiply-adds of HAT-Net and values that it normalises, from Sec. 3 alone, where everything divides."""
    products, normalised, positions = 0, 0, height * width // 4
    dims = config["embed_dims"]
    products += positions * 9 * 3 * 16 + positions // 4 * 9 * 16 * dims[0]  # stem
    normalised += 16 * positions
    for i, (dim, depth) in enumerate(zip(dims, config["depths"], strict=True)):
        h, w = height // (4 * 2**i), width // (4 * 2**i)
        here, hidden = h * w, config["mlp_ratios"][i] * dim
        if i:
            products += here * 9 * dims[i - 1] * dim
            normalised += here * dim
        if i < 3:
            g1, g2 = config["grid_sizes"][i], config["pool_sizes"][i]
            attention, norms = h_mhsa_macs(h, w, dim, g1, g2), 2 * here * dim + here // g2**2 * dim
        else:
            attention, norms = mhsa_macs(h, w, dim), here * dim
        mlp = here * (2 * dim * hidden + config["kernel_sizes"][i] ** 2 * hidden)
        products += depth * (attention + here * dim**2 + mlp)  # W^p in addition to Eq. 15
        normalised += depth * (norms + 2 * here * dim)
    return products + dims[-1] * config["num_classes"], normalised


def normalised_values(model, height, width):
    """Number of values that pass through the normalisations of the model."""
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


def test_parts_without_parameters_are_in_the_total_alone():
    class Gram(nn.Module):
        def forward(self, x):
            return x @ x.mT

    flops = count_flops(nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), Gram()), 32, 48)
    assert list(flops.stages) == ["0"]
    assert flops.total.complete - flops.stages["0"].complete == 3 * 32 * 48 * 32


def test_attention_products_are_in_the_stages_and_in_no_other_part():
    stages = count_flops(HATNet(**SMALL), 64, 64).stages
    with_products = [part for part, count in stages.items() if count.complete > count.paper]
    assert with_products == ["stages.0", "stages.1", "stages.2", "stages.3"]


def test_the_head_counts_one_multiply_add_a_weight():
    assert count_flops(HATNet(**SMALL, num_classes=5), 32, 32).stages["head"] == Count(paper=24 * 5, complete=24 * 5)
    assert "head" not in count_flops(HATNet(**SMALL, num_classes=0), 32, 32).stages


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
        return torch.addbmm(x[0, 0], x[0], x[0].transpose(1, 2) @ x[0])[None, None] + x


class OwnOperator(nn.Module):
    """A matrix product inside a function of one's own, which a trace shows as one opaque operator."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x @ x.transpose(-2, -1) @ x

    def forward(self, x):
        return self.Product.apply(x)


class Spectrum(nn.Module):
    """A short-time Fourier transform of every row, and what it leaves of it."""

    def forward(self, x):
        rows = torch.stft(x.flatten(0, 2), 4, window=torch.ones(4), return_complex=True)
        return torch.istft(rows, 4, window=torch.ones(4), length=x.shape[-1]).view_as(x)


class Frequencies(nn.Module):
    def forward(self, x):
        return torch.fft.rfft2(x).abs()[..., :1] + x


class Similarity(nn.Module):
    """Inner products of all pairs of rows, in one operator."""

    def forward(self, x):
        return torch.cosine_similarity(x[..., None, :], x[..., None, :, :], dim=-1) + x


@pytest.mark.parametrize(
    ("layer", "operator"),
    [
        (FusedProduct(), "aten::addbmm"),
        (OwnOperator(), "prim::PythonOp.Product"),
        (Spectrum(), "aten::istft, aten::stft"),
        (Frequencies(), "aten::fft_rfft2"),
        (Similarity(), "aten::cosine_similarity"),
    ],
)
def test_an_operator_that_cannot_be_counted_is_refused_by_name(layer, operator):
    model = HATNet(**SMALL)
    model.stages[1].blocks[0].attn = layer
    with raises(ValueError, operator):
        count_flops(model, 64, 64)


@pytest.mark.parametrize(("height", "width"), [(31, 64), (64, 16), (0, 0)])
def test_an_image_below_32_pixels_is_refused_with_its_size(height, width):
    with raises(ValueError, "height", "width", 32, f"{height}×{width}"):
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


@pytest.mark.parametrize("name", ["hatnet_tiny", "hatnet_medium"])
@pytest.mark.parametrize("size", [(224, 224), (448, 224)])
def test_the_complete_count_of_the_paper_s_models_is_its_closed_form(name, size):
    model = create_model(name)
    products, normalised = closed_form(model.config, *size)
    assert count_flops(model, *size).total.complete == products + 5 * normalised


def test_blocks_and_operators_add_up_to_the_model():
    flops = count_flops(HATNet(**SMALL), 64, 96)
    for parts in (flops.blocks, flops.operators):
        assert sum(count.paper for count in parts.values()) == flops.total.paper
        assert sum(count.complete for count in parts.values()) == flops.total.complete
    assert [name for name in flops.blocks if name.startswith("stages.1")] == [
        "stages.1.downsample",
        "stages.1.blocks.0",
        "stages.1.blocks.1",
    ]
    assert flops.operators["attention"].paper == 0 < flops.operators["attention"].complete
    assert flops.operators["conv"].paper == flops.operators["conv"].complete


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "pvt_v2_b0",
        "twins_svt_small",
        "convnext_atto",
        "convnextv2_atto",
        "deit_tiny_patch16_224",
        "mvitv2_tiny",
        "xcit_nano_12_p8_224",
        "edgenext_small",
        "mobilevit_s",
        "gcvit_xxtiny",
        "efficientformerv2_s0",
        "halonet26t",
    ],
)
def test_products_in_models_of_timm_are_those_that_torch_dispatches(name):
    model = load_model(f"timm/{name}").eval()
    image = example_image(model, *model.pretrained_cfg["input_size"][1:])
    counted = trace(model, image).by_operator()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert sum(counted[name] for name in ("conv", "linear", *ACTIVATION_PRODUCTS)) == counter.get_total_flops() / 2


def test_pixels_that_fill_no_patch_cost_nothing_in_a_model_of_timm():
    name = "timm/vit_tiny_patch16_224"  # its patches skip what remains at the right and bottom
    counts = [count_flops(load_model(name, (side, side)), side, side).total for side in (96, 100, 112)]
    assert counts[0] == counts[1]
    assert counts[1].complete < counts[2].complete


def test_a_recurrent_model_is_refused_for_its_lstm():
    model = nn.Sequential(nn.Flatten(2), nn.LSTM(64 * 64, 4, batch_first=True))
    with raises(ValueError, "aten::lstm"):
        count_flops(model, 64, 64)


class Projection(nn.Module):
    """A linear layer in the words of a matrix product."""

    def __init__(self, weight, product):
        super().__init__()
        self.weight = weight
        self.product = product

    def forward(self, x):
        return self.product(x.flatten(2).transpose(1, 2), self.weight)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, weight: x @ weight.t(),
        lambda x, weight: torch.matmul(x, weight.transpose(0, 1)),
        lambda x, weight: torch.einsum("bic,oc->bio", x, weight),
    ],
)
def test_a_linear_layer_counts_alike_however_it_is_written(product):
    layer = nn.Linear(3, 8, bias=False)
    written = count_flops(Projection(layer.weight, product), 32, 48)
    usual = count_flops(Projection(layer.weight, nn.functional.linear), 32, 48)
    assert written == usual
    assert written.total == Count(paper=32 * 48 * 3 * 8, complete=32 * 48 * 3 * 8)


@pytest.mark.parametrize(
    ("norm", "a_value"),
    [
        (nn.BatchNorm2d(3), 2),
        (nn.BatchNorm2d(3, affine=False), 1),
        (nn.BatchNorm2d(3, track_running_stats=False), 5),
        (nn.GroupNorm(1, 3), 5),
        (nn.GroupNorm(1, 3, affine=False), 4),
        (nn.LayerNorm(48), 5),
        (nn.InstanceNorm2d(3, affine=True), 5),
        (nn.InstanceNorm2d(3), 4),
    ],
)
def test_a_norm_counts_by_its_values_in_both_conventions(norm, a_value):
    convolution = nn.Conv2d(3, 1, 1, bias=False)
    norms = count_flops(nn.Sequential(norm, convolution), 32, 48).total
    expected = a_value * 3 * 32 * 48 + 3 * 32 * 48
    assert norms == Count(paper=expected, complete=expected)


def test_an_einsum_that_repeats_a_side_of_1_is_counted_in_full():
    class Product(nn.Module):
        def forward(self, x):
            return torch.einsum("bij,bjk->bik", x, torch.ones(1, 4, 5))

    assert trace(Product(), torch.zeros(8, 3, 4)).by_operator()["einsum"] == 8 * 3 * 4 * 5


def test_a_multi_head_attention_with_a_mask_is_counted_and_the_fused_encoder_switched_on_again():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            mask = torch.zeros(x.shape[1], x.shape[1])
            return self.inner(x, x, x, attn_mask=mask)[0]

    counted = trace(Masked(), torch.zeros(1, 10, 8)).by_operator()
    assert counted["baddbmm"] + counted["bmm"] == 2 * 10 * 10 * 8
    assert torch.backends.mha.get_fastpath_enabled()
