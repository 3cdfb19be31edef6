"""Metrics of a detector that finds nothing are 0, with a warning, in validation and in tests."""

import json

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.registry import METRICS

from conftest import SHAPES
from hatnet_dense import runs
from hatnet_dense.cli import main
from hatnet_dense.config import load_config
from hatnet_dense.evaluation import ITEMS, PROPOSAL_ITEMS, fill_with_zeros
from hatnet_dense.flops import build_model
from hatnet_testing import check, raises

NOTHING = {"bboxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0), "masks": []}
CONFIG = str(SHAPES / "retinanet.py")


class Images(BaseMetric):
    """Another metric of the same evaluator: the number of images."""

    default_prefix = "count"

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return {"images": len(results)}


def evaluated(shapes, *others, predictions=NOTHING, fill=fill_with_zeros, **settings):
    """Evaluate one image with a CocoMetric."""
    truth = str(shapes / "annotations" / "instances_val2017.json")
    evaluator = Evaluator([METRICS.build({"type": "mmdet.CocoMetric", "ann_file": truth, **settings}), *others])
    evaluator.dataset_meta = {"classes": ("disk", "square", "triangle")}
    fill(evaluator)
    evaluator.process([{"img_id": 1, "ori_shape": (100, 100), "pred_instances": predictions}])
    return evaluator.evaluate(1)


def named(prefix, items):
    return {f"{prefix}{item}" for item in items}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"metric": "bbox"}, named("coco/bbox_", ITEMS)),
        ({"metric": ["bbox", "segm"]}, named("coco/bbox_", ITEMS) | named("coco/segm_", ITEMS)),
        ({"metric_items": ["mAP_50"], "prefix": "mine"}, {"mine/bbox_mAP_50"}),
        ({"metric": "proposal"}, named("coco/", PROPOSAL_ITEMS)),
        (
            {"metric_items": ["mAP"], "classwise": True},
            {"coco/bbox_mAP", "coco/disk_precision", "coco/square_precision", "coco/triangle_precision"},
        ),
    ],
)
def test_a_detector_that_finds_nothing_has_each_metric_at_0_whatever_others_report(settings, names, shapes):
    metrics = evaluated(shapes, Images(), **settings)
    assert metrics.pop("count/images") == 1
    assert metrics == dict.fromkeys(names, 0.0)


@pytest.mark.parametrize("settings", [{"metric": ["bbox", "segm"]}, {"metric": "proposal"}, {"classwise": True}])
def test_the_names_are_those_of_a_detector_that_finds_something(settings, shapes):
    found = {"bboxes": torch.tensor([[1.0, 2, 30, 40]]), "scores": torch.ones(1), "labels": torch.zeros(1).long()}
    found["masks"] = [{"size": [100, 100], "counts": "0ZQ3"}]
    measured = evaluated(shapes, predictions=found, fill=id, **settings)
    assert measured.keys() == evaluated(shapes, **settings).keys()


def test_a_metric_that_is_measured_is_kept_where_another_is_missing():
    class CocoMetric(Images):
        metrics, metric_items, format_only, classwise = ["bbox", "segm"], None, False, False

        def compute_metrics(self, results):
            return dict.fromkeys(named("bbox_", ITEMS), 0.5)

    evaluator = Evaluator([CocoMetric(prefix="a")])
    fill_with_zeros(evaluator)
    evaluator.process([{}])
    expected = dict.fromkeys(named("a/bbox_", ITEMS), 0.5) | dict.fromkeys(named("a/segm_", ITEMS), 0.0)
    assert evaluator.evaluate(1) == expected


def test_a_metric_that_only_writes_its_results_stays_without_figures(shapes, tmp_path):
    assert evaluated(shapes, format_only=True, outfile_prefix=str(tmp_path / "results")) == {}


def test_training_and_testing_log_zeros_and_keep_the_best_checkpoint(shapes, tmp_path, capsys):
    options = ["--cfg-options", "model.test_cfg.score_thr=2", "default_hooks.checkpoint.save_best=coco/bbox_mAP"]
    options += ["train_cfg.max_epochs=1", "train_cfg.val_interval=1", "param_scheduler.0.end=900"]
    options += [f"{kind}_dataloader.dataset.pipeline.1.scale=(96,96)" for kind in ("val", "test")]
    options.append("train_dataloader.dataset.pipeline.2.scale=(96,96)")
    assert main(["train", CONFIG, "--work-dir", str(tmp_path / "run"), *options]) == 0
    (log,) = (tmp_path / "run").glob("*/*.log")
    (reason,) = [line for line in log.read_text().splitlines() if "WARNING" in line and "coco/bbox_mAP" in line]
    check(reason, "coco/bbox_mAP", "coco/bbox_mAP_50", 0)
    (scalars,) = (tmp_path / "run").glob("*/vis_data/scalars.json")
    assert json.loads(scalars.read_text().splitlines()[-1])["coco/bbox_mAP"] == 0
    (best,) = (tmp_path / "run").glob("best_*.pth")
    capsys.readouterr()
    assert main(["test", CONFIG, str(best), "--work-dir", str(tmp_path / "test"), *options]) == 0
    output = capsys.readouterr().out
    assert json.loads(output[output.rindex("{") :])["coco/bbox_mAP"] == 0


def test_evaluators_that_measure_nothing_are_an_error(shapes, tmp_path):
    config = load_config(CONFIG)
    config.test_evaluator = {"type": "DumpResults", "out_file_path": str(tmp_path / "results.pkl")}
    torch.save({"state_dict": build_model(config).state_dict(), "meta": {}}, tmp_path / "a.pth")
    with raises(ValueError, "test_evaluator"):
        runs.evaluate(config, tmp_path / "a.pth", tmp_path)
