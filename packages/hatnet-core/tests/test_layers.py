import pytest
import torch
import torch.nn.functional as F

from hatnet_core.layers import Downsample, DropPath, Mlp, Stem
from hatnet_testing import raises
from slow_reading import normalise


def randomise(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module.double()


def silu(x):
    return x / (1 + (-x).exp())


def gelu(x):
    return x * (1 + torch.erf(x / 2**0.5)) / 2


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_mlp_is_the_inverted_residual_of_section_3_3(kernel_size):
    mlp = randomise(Mlp(6, mlp_ratio=3, kernel_size=kernel_size))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    hidden = silu(torch.einsum("oc,bchw->bohw", mlp.expand.weight[:, :, 0, 0], normalise(x, mlp.norm)))
    reach = kernel_size // 2
    padded = F.pad(hidden, (reach,) * 4)
    mixed = sum(
        mlp.dwconv.weight[None, :, 0, i, j, None, None] * padded[:, :, i : i + 5, j : j + 7]
        for i in range(kernel_size)
        for j in range(kernel_size)
    )
    expected = normalise(torch.einsum("oc,bchw->bohw", mlp.project.weight[:, :, 0, 0], silu(mixed)), mlp.out_norm)
    torch.testing.assert_close(mlp(x), expected)
    assert all(conv.bias is None for conv in (mlp.expand, mlp.dwconv, mlp.project))


def test_mlp_without_depthwise_convolution_is_that_of_a_pure_transformer_with_one_activation():
    mlp = randomise(Mlp(6, mlp_ratio=3, depthwise=False))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    hidden = silu(torch.einsum("oc,bchw->bohw", mlp.expand.weight[:, :, 0, 0], normalise(x, mlp.norm)))
    expected = normalise(torch.einsum("oc,bchw->bohw", mlp.project.weight[:, :, 0, 0], hidden), mlp.out_norm)
    torch.testing.assert_close(mlp(x), expected)
    assert not any("dwconv" in name for name, _ in mlp.named_parameters())


def test_gelu_replaces_silu_in_stem_and_mlp():
    mlp = randomise(Mlp(6, mlp_ratio=3, activation="gelu"))
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    hidden = torch.einsum("oc,bchw->bohw", mlp.expand.weight[:, :, 0, 0], normalise(x, mlp.norm))
    mixed = F.conv2d(gelu(hidden), mlp.dwconv.weight, padding=1, groups=18)
    expected = normalise(torch.einsum("oc,bchw->bohw", mlp.project.weight[:, :, 0, 0], gelu(mixed)), mlp.out_norm)
    torch.testing.assert_close(mlp(x), expected)
    stem = randomise(Stem(3, 8, activation="gelu"))
    image = torch.randn(1, 3, 9, 13, dtype=torch.float64)
    hidden = gelu(normalise(F.conv2d(image, stem.conv1.weight, stem.conv1.bias, stride=2, padding=1), stem.norm))
    torch.testing.assert_close(stem(image), F.conv2d(hidden, stem.conv2.weight, stem.conv2.bias, stride=2, padding=1))


def test_mlp_refuses_an_even_kernel():
    with raises(ValueError, "kernel_size", 4):
        Mlp(6, 2, kernel_size=4)


def test_stem_is_two_strided_convolutions_with_norm_and_silu_between():
    stem = randomise(Stem(3, 8))
    x = torch.randn(2, 3, 9, 13, dtype=torch.float64)
    hidden = F.conv2d(x, stem.conv1.weight, stem.conv1.bias, stride=2, padding=1)
    expected = F.conv2d(silu(normalise(hidden, stem.norm)), stem.conv2.weight, stem.conv2.bias, stride=2, padding=1)
    torch.testing.assert_close(stem(x), expected)
    assert stem(x).shape == (2, 8, 3, 4)


def test_downsample_is_a_strided_convolution_then_norm():
    layer = randomise(Downsample(3, 8))
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    expected = normalise(F.conv2d(x, layer.conv.weight, layer.conv.bias, stride=2, padding=1), layer.norm)
    torch.testing.assert_close(layer(x), expected)


def test_drop_path_drops_whole_samples_at_its_rate_and_keeps_the_mean():
    layer = DropPath(0.25)
    out = layer(torch.ones(4000, 2, 3, 1))
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    torch.testing.assert_close(out.max(), torch.tensor(1 / 0.75))
    assert (per_sample[:, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_drop_path_is_the_identity_in_evaluation():
    x = torch.randn(3, 2, 1, 1)
    assert DropPath(0.9).eval()(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_refuses_a_rate_outside_0_to_1(rate):
    with raises(ValueError, "drop path rate", rate):
        DropPath(rate)
