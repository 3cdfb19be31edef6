"""Models by name: ours, timm's, and configs of the dense libraries; what is refused, and how."""

import builtins
import importlib.util

import pytest
import torch

from hatnet_analysis import Count, count_flops
from hatnet_analysis.models import check_name, classifier, load_model, on_meta, with_backbone
from hatnet_core import HATNet
from hatnet_testing import raises

pytestmark = pytest.mark.long


def test_a_name_of_ours_is_our_model_ablations_included():
    assert isinstance(load_model("hatnet_small_gelu"), HATNet)


def test_a_model_of_timm_that_is_bound_to_a_size_is_built_for_the_size_asked_for():
    image = torch.zeros(1, 3, 96, 160)
    with torch.no_grad():
        assert load_model("timm/deit_tiny_patch16_224", (96, 160)).eval()(image).shape == (1, 1000)
        assert load_model("timm/resnet18", (96, 160)).eval()(image).shape == (1, 1000)


@pytest.mark.parametrize(("name", "side"), [("deit_base_patch16_384", 384), ("swinv2_tiny_window8_256", 256)])
def test_without_a_size_a_model_of_timm_is_built_for_its_own(name, side):
    for build in (load_model, on_meta):
        model = build(f"timm/{name}")
        assert model.patch_embed.img_size == (side, side)
    assert load_model(f"timm/{name}", (128, 128)).patch_embed.img_size == (128, 128)


def test_a_tag_of_timm_says_what_is_built():
    assert load_model("timm/resnet50.a1_in1k").num_classes == 1000
    assert load_model("timm/deit3_small_patch16_224.fb_in22k_ft_in1k").num_classes == 1000
    assert load_model("timm/vit_tiny_patch16_224.augreg_in21k").num_classes == 21843


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("hatnet_smal", ["'hatnet_smal'", "hatnet_tiny", "hatnet_small"]),
        ("hatnet_small_gel", ["'hatnet_small_gel'", "hatnet_tiny", "hatnet_small_gelu"]),
        ("timm/resnet_50", ["'timm/resnet_50'", "timm/resnet50"]),
        ("timm/resnet50.foo", ["'timm/resnet50.foo'", "resnet50.a1_in1k"]),
        ("timm/resnet50.", ["'timm/resnet50.'"]),
        ("timm/hf-hub:someone/something", ["'timm/hf-hub:someone/something'"]),
        ("nowhere.py", ["nowhere.py"]),
        ("mmdet::nowhere.py", ["nowhere.py", "mmdet"]),
        ("../configs/mask-rcnn_hatnet-t_fpn_1x_coco", ["'../configs/mask-rcnn_hatnet-t_fpn_1x_coco'"]),
    ],
)
def test_an_unknown_name_is_refused_with_what_was_expected(name, named):
    with raises(ValueError, *named):
        check_name(name)


def test_a_size_that_a_model_cannot_be_built_for_is_refused():
    with raises(ValueError, "timm/twins_svt_small", "8×8"):
        load_model("timm/twins_svt_small", (8, 8))


def test_without_timm_its_models_name_the_extra(monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name == "timm":
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with raises(ImportError, "timm/resnet18", "hatnet-analysis[timm]"):
        check_name("timm/resnet18")


def test_without_hatnet_dense_its_configs_name_the_extra(monkeypatch):
    monkeypatch.setattr("hatnet_analysis.models.find_spec", lambda name: None)
    with raises(ImportError, "mmdet::a.py", "hatnet-dense", "hatnet-analysis[dense]"):
        check_name("mmdet::a.py")
    with raises(ValueError, "mask-rcnn_hatnet-t_fpn_1x_coco"):
        check_name("mask-rcnn_hatnet-t_fpn_1x_coco")


dense = pytest.mark.skipif(importlib.util.find_spec("mmdet") is None, reason="needs MMDetection and MMSegmentation")


@dense
def test_a_segmenter_takes_the_backbone_of_a_detector():
    head = "mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py"
    model = with_backbone(head, "mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py")
    assert type(model.model.backbone).__name__ == "PyramidVisionTransformer"
    with torch.no_grad():
        (logits,) = model(torch.zeros(1, 3, 64, 64))
    assert logits.shape[:2] == (1, 150)


@dense
def test_a_backbone_becomes_a_classifier():
    model = classifier("mmdet::pvt/retinanet_pvt-t_fpn_1x_coco.py").eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


@dense
@pytest.mark.parametrize(
    "name",
    [
        "mask-rcnn_hatnet-t_fpn_1x_coco",
        "semfpn_hatnet-t_4xb4-80k_ade20k-512x512",
        "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py",
        "mmdet::detr/detr_r50_8xb2-150e_coco.py",
    ],
)
def test_a_config_counts_alike_every_time_and_as_hatnet_dense_counts_it(name):
    from hatnet_dense.config import load_config
    from hatnet_dense.flops import count

    first, second = (count_flops(load_model(name), 96, 160).total for _ in range(2))
    row = count(load_config(name), 96, 160)
    assert first == second == Count(paper=row["flops_paper"], complete=row["flops_complete"])


@dense
def test_an_exchanged_backbone_has_the_same_weights_every_time():
    head, backbone = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"
    first, second = (count_flops(with_backbone(head, backbone), 96, 160) for _ in range(2))
    assert first == second
