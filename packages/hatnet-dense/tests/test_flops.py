"""FLOPs of whole models against PyTorch's counter and the figures of the paper's tables."""

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hatnet_core.flop_handles import HANDLES
from hatnet_dense.config import load_config
from hatnet_dense.flops import build_model, count, traceable
from hatnet_testing import raises

SIZE = (96, 160)


def test_the_complete_count_of_the_backbone_is_that_of_pytorch_and_the_norms():
    config = load_config("retinanet_hatnet-t_fpn_1x_coco")
    row = count(config, *SIZE)
    model = build_model(config)
    sizes = []
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
    # the attention as two plain products, which its counter sees
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.backbone(torch.zeros(1, 3, *SIZE))
    products = counter.get_total_flops() // 2  # it counts a multiply-add as two
    assert row["backbone_flops_complete"] == products + 5 * sum(sizes)
    assert row["backbone_flops_paper"] < row["backbone_flops_complete"] < row["flops_complete"]
    assert row["backbone_params"] == sum(p.numel() for p in model.backbone.parameters())


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [  # counted beforehand, with another program, over MMDetection 3.3
        ("retinanet_hatnet-t_fpn_1x_coco", (800, 1280), 203.3),
        pytest.param("mask-rcnn_hatnet-s_fpn_1x_coco", (800, 1280), 276.1, marks=pytest.mark.slow),
    ],
)
def test_the_complete_count_of_the_detectors_of_table_4(name, size, expected):
    assert count(load_config(name), *size)["flops_complete"] / 1e9 == pytest.approx(expected, abs=0.05)


def test_every_image_of_a_batch_has_proposals_of_its_own():
    module = traceable(load_config("mask-rcnn_hatnet-t_fpn_1x_coco"))
    proposals = []
    module.model.roi_head.bbox_head.register_forward_pre_hook(lambda _, inputs: proposals.append(len(inputs[0])))
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        module(image)
        module(image.repeat(3, 1, 1, 1))
    assert proposals[1] == pytest.approx(3 * proposals[0], rel=0.02)  # equal images, but for rounding


def test_a_detector_of_two_stages_counts_the_same_every_time_and_leaves_the_generator_as_it_was():
    config = load_config("mask-rcnn_hatnet-t_fpn_1x_coco")
    before = torch.get_rng_state()
    first = count(config, *SIZE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert count(config, *SIZE) == first


def test_at_the_size_of_the_tables_a_detector_keeps_the_1000_proposals_of_its_config():
    module = traceable(load_config("mask-rcnn_hatnet-t_fpn_1x_coco"))
    proposals = []
    module.model.roi_head.bbox_head.register_forward_pre_hook(lambda _, inputs: proposals.append(len(inputs[0])))
    with torch.no_grad():
        module(torch.zeros(1, 3, 800, 1280))
        module(torch.zeros(1, 3, *SIZE))
    assert proposals[0] == 1000 > proposals[1]


def test_a_row_of_table_6_costs_more_than_the_default_by_the_pooling_it_leaves_out():
    finer = count(load_config("mask-rcnn_hatnet-s-g8-8-8-p8-4-2_fpn_1x_coco"), 800, 1280)
    assert finer["flops_complete"] / 1e9 - 276.1 == pytest.approx(37.7, abs=0.1)  # the paper: 338 - 303 = 35


def test_a_product_with_a_weight_is_a_linear_layer_and_one_that_adds_a_mask_is_counted():
    class Products(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(7, 5))

        def forward(self, x):
            rows = torch.baddbmm(x[..., :1], x, x.transpose(1, 2)) @ x
            return torch.einsum("bic,oc->bio", rows, self.weight)

    analysis = FlopAnalyzer(Products(), torch.zeros(3, 4, 5)).set_op_handle(**HANDLES)
    assert analysis.by_operator() == {"baddbmm": 3 * 4 * 5 * 4, "matmul": 3 * 4 * 4 * 5, "linear": 3 * 4 * 5 * 7}


def test_a_model_of_the_library_itself_is_counted_and_products_outside_the_fused_operator_are_attention():
    row = count(load_config("mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py"), 96, 96)
    assert row["flops_paper"] < row["flops_complete"]  # Swin's windows are plain matrix products there
    plain = count(load_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"), 96, 96)
    assert plain["flops_paper"] == plain["flops_complete"]


@pytest.mark.parametrize(
    ("option", "named"),
    [("model.type=Foo", ["KeyError", "Foo"]), ("model.bbox_head.foo=1", ["TypeError", "foo"])],
)
def test_a_model_that_cannot_be_built_is_one_line(option, named):
    with raises(ValueError, *named) as error:
        build_model(load_config("retinanet_hatnet-t_fpn_1x_coco", [option]))
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_a_run_that_takes_too_much_memory_is_one_line(monkeypatch):
    def exhausted(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr("hatnet_dense.flops.FlopAnalyzer.by_operator", exhausted)
    with raises(ValueError, "64×96", "RuntimeError: DefaultCPUAllocator: can't allocate memory") as error:
        count(load_config("retinanet_hatnet-t_fpn_1x_coco"), 64, 96)
    assert "\n" not in str(error.value)
