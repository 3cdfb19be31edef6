import pytest
import torch

from hatnet_core import create_model, list_models
from hatnet_testing import raises

ABLATIONS = [name for name in list_models(ablations=True) if name not in list_models()]
SMALL_BLOCKS = [
    (64, 2, 8),
    (128, 3, 8),
    (320, 8, 4),
    (512, 3, 4),
]  # Table 1: channels, blocks, expansion of stages 2-5


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_four_variants_of_the_paper_are_listed_by_size():
    assert list_models() == ["hatnet_tiny", "hatnet_small", "hatnet_medium", "hatnet_large"]


def test_an_unknown_model_is_refused_with_the_known_ones():
    with raises(ValueError, "hatnet_huge", *list_models()):
        create_model("hatnet_huge")


def test_arguments_reach_the_model_over_those_of_the_variant():
    model = create_model("hatnet_tiny", num_classes=7, in_chans=1, grid_sizes=(8, 8, 8))
    assert model.get_classifier().out_features == 7
    assert model.config["in_chans"] == 1
    assert model.config["grid_sizes"] == (8, 8, 8)
    assert model.config["head_dim"] == 48


def window_savings(stage):
    """Parameters that a stage of HAT-Net-Small has fewer with Swin's windows than with H-MHSA.

    H-MHSA has beyond qkv and proj a q of C²+C, a kv of 2C²+2C and two norms of 2C; the windows have a bias for each of
    the (2·7-1)² offsets in every head of 64 channels.
    """
    channels, blocks, _ = SMALL_BLOCKS[stage]
    return blocks * (3 * channels**2 + 3 * channels + 4 * channels - 13**2 * channels // 64)


EXPECTED_SAVINGS = {
    "hatnet_small_window234": sum(map(window_savings, (0, 1, 2))),
    "hatnet_small_window34": sum(map(window_savings, (1, 2))),
    "hatnet_small_window4": window_savings(2),
    "hatnet_small_no_depthwise": sum(3 * 3 * e * c * blocks for c, blocks, e in SMALL_BLOCKS),
}
"""GELU, G1 and G2 carry no parameters: the other ablations save none."""


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_has_the_parameters_of_its_definition_and_trains_a_step(name):
    model = create_model(name, num_classes=4, drop_rate=0.0)
    assert count(create_model("hatnet_small", num_classes=4)) - count(model) == EXPECTED_SAVINGS.get(name, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images, labels = torch.randn(2, 3, 160, 160), torch.tensor([0, 1])  # several pools along every axis
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    assert [n for n, p in model.named_parameters() if not (p.grad.isfinite().all() and p.grad.any())] == []
    optimizer.step()
    with torch.no_grad():
        assert torch.nn.functional.cross_entropy(model(images), labels) < loss


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_hatnet_small_in_its_output(name):
    """With the same weights where they have the same names, at a size where G1 and G2 of every row act."""
    small, model = create_model("hatnet_small").eval(), create_model(name).eval()
    model.load_state_dict({k: v for k, v in small.state_dict().items() if k in model.state_dict()}, strict=False)
    image = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        assert not torch.allclose(model(image), small(image))


@pytest.mark.parametrize(
    ("name", "grid_sizes", "pool_sizes"),
    [
        ("hatnet_small_grid_8_8_8_pool_8_4_2", (8, 8, 8), (8, 4, 2)),
        ("hatnet_small_grid_8_8_8_pool_12_6_3", (8, 8, 8), (12, 6, 3)),
        ("hatnet_small_grid_8_8_8_pool_16_8_4", (8, 8, 8), (16, 8, 4)),
        ("hatnet_small_grid_8_8_8_pool_32_16_8", (8, 8, 8), (32, 16, 8)),
        ("hatnet_small_grid_16_16_8_pool_16_8_4", (16, 16, 8), (16, 8, 4)),
        ("hatnet_small_grid_4_4_4_pool_16_8_4", (4, 4, 4), (16, 8, 4)),
    ],
)
def test_the_rows_of_table_6_are_hatnet_small_with_their_grids_and_pools(name, grid_sizes, pool_sizes):
    small = create_model("hatnet_small").eval()
    row = create_model(name).eval()
    row.load_state_dict(small.state_dict())
    small.set_grid(grid_sizes, pool_sizes)
    image = torch.randn(1, 3, 160, 128)
    with torch.no_grad():
        assert torch.equal(row(image), small(image))


def test_windows_are_shifted_in_every_second_block():
    stages = create_model("hatnet_small_window234").stages
    assert [[block.attn.shift for block in stage.blocks] for stage in stages[:3]] == [[0, 3], [0, 3, 0], [0, 3] * 4]
