"""Products as a trace shows them, against PyTorch's own counter."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hatnet_core.flop_handles import ACTIVATION_PRODUCTS, HANDLES, conventions
from hatnet_testing import raises


class Product(nn.Module):
    """A product of an image of tokens [B, n, 5] with itself or with something the model holds [7, 5]."""

    def __init__(self, product):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))
        self.register_buffer("fixed", torch.randn(7, 5))
        self.register_buffer("derived", torch.randn(7, 5), persistent=False)
        self.product = product

    def forward(self, x):
        return self.product(self, x)


def counted(product, x):
    """FLOPs by name of all operators that have a handle; anything else has to be without products."""
    graph, _ = torch.jit._get_trace_graph(Product(product), x)
    nodes = [node for node in graph.nodes() if node.kind() in HANDLES]
    return sum((HANDLES[node.kind()](list(node.inputs()), list(node.outputs())) for node in nodes), Counter())


def dispatched(product, x):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        Product(product)(x)
    return counter.get_total_flops() // 2  # it counts a multiply-add as two


WITH_A_WEIGHT = {
    "@": lambda m, x: x @ m.weight.t(),
    "@ on the left": lambda m, x: m.weight @ x.mT,
    "@, a part": lambda m, x: x @ m.weight[2:4].t(),
    "matmul, cast": lambda m, x: torch.matmul(x.double(), m.weight.permute(1, 0).to(torch.float64)),
    "einsum": lambda m, x: torch.einsum("bic,oc->bio", x, m.weight),
    "einsum with an ellipsis": lambda m, x: torch.einsum("...c, oc -> ...o", x, m.weight),
    "bmm": lambda m, x: torch.bmm(x, m.weight.t().unsqueeze(0).expand(3, -1, -1)),
    "baddbmm": lambda m, x: torch.baddbmm(x[..., :1], x, m.weight.t().reshape(1, 5, 7).expand(3, -1, -1)),
    "mm": lambda m, x: torch.mm(x.flatten(0, 1), m.weight.detach().transpose(0, 1)),
    "addmm": lambda m, x: torch.addmm(x[0, 0, 0], x.view(12, 5), m.weight.T.contiguous()),
    "linear": lambda m, x: nn.functional.linear(x, m.weight, m.weight[:, 0]),
    "linear, a vector": lambda m, x: nn.functional.linear(x[0, 0], m.weight),
    "linear of what the model holds": lambda m, x: nn.functional.linear(m.weight, x[0]),
    "linear with a weight that is normalised": lambda m, x: nn.functional.linear(
        x, m.weight / m.weight.norm(dim=1, keepdim=True)
    ),
    "linear with a weight cut to the image": lambda m, x: nn.functional.linear(x, (m.weight * 2)[: x.shape[1]]),
    "a buffer": lambda m, x: x @ m.fixed.t(),
    "a buffer outside the checkpoint": lambda m, x: x @ m.derived.t(),
}


@pytest.mark.parametrize("product", WITH_A_WEIGHT.values(), ids=WITH_A_WEIGHT.keys())
def test_a_product_with_a_weight_counts_as_a_linear_layer_in_both_conventions(product):
    x = torch.randn(3, 4, 5)
    assert counted(product, x) == {"linear": dispatched(product, x)}
    assert conventions(counted(product, x)) == (dispatched(product, x),) * 2


OF_ACTIVATIONS = {
    "@": lambda m, x: x @ x.mT,
    "matmul of one matrix with many": lambda m, x: x[0] @ x.mT,
    "einsum": lambda m, x: torch.einsum("bic,bjc->bij", x, x),
    "einsum with a side of 1": lambda m, x: torch.einsum("bic,bcj->bij", x, x[:1].mT),
    "einsum with an ellipsis": lambda m, x: torch.einsum("...ic,...jc->...ij", x, x),
    "bmm": lambda m, x: torch.bmm(x, x.mT),
    "baddbmm": lambda m, x: torch.baddbmm(x[..., :1], x, x.mT),
    "mm": lambda m, x: torch.mm(x[0], x[1].t()),
    "addmm": lambda m, x: torch.addmm(x[0, :, :1], x[0], x[1].t()),
    "linear": lambda m, x: nn.functional.linear(x, x[0, :2] + 1),
    "linear with a weight that the image chooses": lambda m, x: nn.functional.linear(x, m.weight * x.mean()),
    "convolution": lambda m, x: nn.functional.conv1d(x.mT, x[:2, :3].mT * m.weight[0, 0], x[0, 0, :2], padding=1),
    "attention": lambda m, x: nn.functional.scaled_dot_product_attention(x, x[:, :3], x[:, 1:]),
}


@pytest.mark.parametrize("product", OF_ACTIVATIONS.values(), ids=OF_ACTIVATIONS.keys())
def test_a_product_of_activations_counts_in_the_complete_convention_alone(product):
    x = torch.randn(3, 4, 5)
    (name,) = counted(product, x)
    assert name in ACTIVATION_PRODUCTS
    assert conventions(counted(product, x)) == (0, dispatched(product, x))


CONVOLUTIONS = {
    "plain": lambda m, x: nn.functional.conv1d(x.mT, m.weight[..., None], stride=2),
    "grouped": lambda m, x: nn.functional.conv1d(x.mT, m.weight[:5, None, :3], groups=5),
    "with a kernel that is standardised": lambda m, x: nn.functional.conv1d(
        x.mT, (m.weight / m.weight.std())[..., None]
    ),
    "transposed": lambda m, x: nn.functional.conv_transpose1d(x.mT, m.weight.t()[..., None].expand(5, 7, 3), stride=2),
}


@pytest.mark.parametrize("product", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_a_convolution_with_a_kernel_of_the_model_counts_in_both_conventions(product):
    x = torch.randn(3, 4, 5)
    assert counted(product, x) == {"conv": dispatched(product, x)}
    assert conventions(counted(product, x)) == (dispatched(product, x),) * 2


def test_what_is_computed_from_a_weight_is_an_activation():
    # learned queries, as of a decoder: the product with the keys belongs to an attention
    queries = counted(lambda m, x: nn.functional.linear(m.weight, m.weight[:5]) @ x.mT, torch.randn(3, 4, 5))
    assert queries == {"linear": 7 * 5 * 5, "matmul": 3 * 7 * 4 * 5}


def test_an_einsum_of_one_operand_has_no_product():
    assert conventions(counted(lambda m, x: torch.einsum("bij->bji", x), torch.randn(3, 4, 5))) == (0, 0)


def test_an_einsum_of_three_operands_is_refused():
    with raises(ValueError, "einsum", "bi,bi,bj->bj"):
        counted(lambda m, x: torch.einsum("bi,bi,bj->bj", x, x, x), torch.randn(3, 4))
