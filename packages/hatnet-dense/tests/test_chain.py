"""Train, test and predict on drawn shapes, for a few dozen steps.

docs/benchmarks has the figures of whole trainings, which nox -s dense_training repeats.
"""

import functools
import json
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.utils import get_installed_path
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hatnet_dense.cli import main
from hatnet_testing import check, error_line

SHAPES = Path(__file__).parent / "shapes"
TOOLS = {"mask-rcnn": "mmdet"}
"""Models trained with the tools of their library, the others with our command."""
WITHOUT_TOOLS = pytest.mark.skipif(
    "mmsegmentation" not in packages_distributions()["mmseg"],
    reason="before a config of it can import anything, a fork's MMEngine looks for mmseg:: under the official name",
)
if not WITHOUT_TOOLS.args[0]:
    TOOLS["semfpn"] = "mmseg"
STEPS = {  # 20 steps: 5 rounds of 16 images, 4 a step
    "mask-rcnn": ["train_cfg.max_epochs=5", "train_cfg.val_interval=5"],
    "retinanet": ["train_cfg.max_epochs=5", "train_cfg.val_interval=5"],
    "semfpn": [
        "train_cfg.max_iters=20",
        "train_cfg.val_interval=20",
        "default_hooks.checkpoint.interval=10",
        "train_dataloader.batch_size=4",
    ],
}
QUICK = [
    "default_hooks.logger.interval=1",
    "optim_wrapper.optimizer.lr=2e-4",
    "param_scheduler=[]",
    "default_hooks.checkpoint.max_keep_ckpts=-1",
]
DETECTORS = ["train_dataloader.dataset.pipeline.2.scale=(96,96)", "val_dataloader.dataset.pipeline.1.scale=(96,96)"]
DETECTORS += ["test_dataloader.dataset.pipeline.1.scale=(96,96)"]
METRIC = {"mask-rcnn": "coco/bbox_mAP", "retinanet": "coco/bbox_mAP", "semfpn": "mIoU"}


def options(head, *more):
    return ["--cfg-options", *QUICK, *STEPS[head], *(DETECTORS if head != "semfpn" else []), *more]


def scalars(work_dir):
    (log, *_) = sorted(Path(work_dir).glob("*/vis_data/scalars.json"))
    return [json.loads(line) for line in log.read_text().splitlines()]


def losses(work_dir):
    return [row["loss"] for row in scalars(work_dir) if "loss" in row]


def check_fallen(values):
    assert len(values) == 20
    assert np.isfinite(values).all()
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5]), values


def tool(library, name, head, *arguments):
    """Run tools/train.py or tools/test.py of the library in another process."""
    script = Path(get_installed_path(library)) / ".mim" / "tools" / name
    command = [sys.executable, str(script), str(SHAPES / f"{head}.py"), *map(str, arguments), *options(head)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def run_of(shapes, tmp_path_factory):
    """Return a function that trains the model of a config once, and returns the folder of its run."""

    @functools.cache
    def run(head):
        folder = tmp_path_factory.mktemp(head)
        if head in TOOLS:
            tool(TOOLS[head], "train.py", head, "--work-dir", folder)
        else:
            command = ["train", str(SHAPES / f"{head}.py"), "--work-dir", str(folder)]
            assert main([*command, *options(head)]) == 0
        return folder

    return run


def last_checkpoint(folder):
    return (folder / "last_checkpoint").read_text()


@pytest.mark.parametrize("head", ["retinanet", "semfpn", "mask-rcnn"])
def test_training_lowers_the_loss(head, run_of):
    check_fallen(losses(run_of(head)))


@pytest.mark.parametrize(
    ("head", "middle", "done", "named"), [("retinanet", "epoch_3.pth", 12, False), ("semfpn", "iter_10.pth", 10, True)]
)
def test_a_resumed_run_goes_on_where_it_stopped(head, middle, done, named, run_of, tmp_path):
    whole = run_of(head)
    command = ["train", str(SHAPES / f"{head}.py"), "--work-dir", str(tmp_path), "--resume"]
    if named:
        command.append(str(whole / middle))
    else:
        (tmp_path / "last_checkpoint").write_text(str(whole / middle))
    assert main([*command, *options(head)]) == 0
    assert len(losses(tmp_path)) == 20 - done
    assert losses(tmp_path)[0] < np.mean(losses(whole)[:3])
    content = torch.load(last_checkpoint(tmp_path), weights_only=True)
    assert content["meta"]["iter"] == 20
    (history, *_) = content["message_hub"]["log_scalars"]["train/loss"].values()
    assert len(history[0]) == 20  # those before the checkpoint, too
    assert all(state["step"] == 20 for state in content["optimizer"]["state"].values())


@pytest.mark.parametrize("head", ["retinanet", "semfpn"])
def test_the_checkpoint_repeats_the_figures_of_its_training(head, run_of, tmp_path):
    out = tmp_path / "metrics.json"
    command = ["test", str(SHAPES / f"{head}.py"), last_checkpoint(run_of(head)), "--work-dir", str(tmp_path)]
    command += ["--out", str(out), "--show-dir", str(tmp_path / "drawn")]
    assert main([*command, *options(head)]) == 0
    metrics = json.loads(out.read_text())
    trained = scalars(run_of(head))[-1]
    names = {name for name in metrics if not name.endswith("time")}
    assert METRIC[head] in names
    assert {name: metrics[name] for name in names} == {name: trained[name] for name in names}
    assert len([path for path in (tmp_path / "drawn").rglob("*") if path.suffix in (".png", ".jpg")]) == 4


def predicted(head, shapes, checkpoint, out):
    images = {"semfpn": shapes / "images" / "validation"}.get(head, shapes / "val2017")
    command = ["predict", str(SHAPES / f"{head}.py"), checkpoint, str(images), "--out", str(out)]
    assert main([*command, *options(head)]) == 0
    for i in range(1, 5):
        with Image.open(out / f"{i:06}.png") as drawn, Image.open(images / f"{i:06}.jpg") as image:
            assert drawn.size == image.size
    return json.loads((out / "predictions.json").read_text())


def check_coco(record, shapes, kind, expected, tmp_path):
    """Evaluate the JSON of predict with pycocotools."""
    (tmp_path / "results.json").write_text(json.dumps(record["annotations"]))
    truth = COCO(shapes / "annotations" / "instances_val2017.json")
    assert [image["file_name"] for image in record["images"]] == [i["file_name"] for i in truth.dataset["images"]]
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[1] == pytest.approx(expected, abs=6e-4)  # it rounds to three digits


def test_the_boxes_of_predict_are_those_that_were_tested(shapes, run_of, tmp_path):
    record = predicted("retinanet", shapes, last_checkpoint(run_of("retinanet")), tmp_path / "out")
    assert [category["name"] for category in record["categories"]] == ["disk", "square", "triangle"]
    assert record["annotations"]
    check_coco(record, shapes, "bbox", scalars(run_of("retinanet"))[-1]["coco/bbox_mAP_50"], tmp_path)


def test_the_label_images_of_predict_have_the_mean_iou_that_was_tested(shapes, run_of, tmp_path):
    record = predicted("semfpn", shapes, last_checkpoint(run_of("semfpn")), tmp_path / "out")
    meet, join = np.zeros(4), np.zeros(4)
    for entry in record["images"]:
        with Image.open(tmp_path / "out" / entry["labels"]) as image:
            assert image.mode == "P"
            labels = np.array(image)
        truth = np.array(Image.open(shapes / "annotations" / "validation" / f"{Path(entry['file_name']).stem}.png"))
        assert entry["pixels"] == {str(v): int((labels == v).sum()) for v in np.unique(labels)}
        for k in range(4):
            given, found = truth == k + 1, (labels == k) & (truth > 0)
            meet[k] += (given & found).sum()
            join[k] += (given | found).sum()
    assert 100 * np.nanmean(meet / join) == pytest.approx(scalars(run_of("semfpn"))[-1]["mIoU"], abs=0.01)


def test_the_masks_of_predict_are_those_that_were_tested(shapes, run_of, tmp_path):
    run = run_of("mask-rcnn")
    record = predicted("mask-rcnn", shapes, last_checkpoint(run), tmp_path / "out")
    check_coco(record, shapes, "segm", scalars(run)[-1]["coco/segm_mAP_50"], tmp_path)


@pytest.mark.parametrize(
    ("library", "head"), [("mmdet", "mask-rcnn"), pytest.param("mmseg", "semfpn", marks=WITHOUT_TOOLS)]
)
def test_the_librarys_own_tool_repeats_the_figures_of_the_training(library, head, run_of, tmp_path):
    tool(library, "test.py", head, last_checkpoint(run_of(head)), "--work-dir", tmp_path)
    (metrics,) = [json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")]
    trained = scalars(run_of(head))[-1]
    names = [name for name in metrics if not name.endswith("time")]
    assert METRIC[head] in names
    assert {name: metrics[name] for name in names} == {name: trained[name] for name in names}


def refused(capsys, named, *arguments):
    """Check the error line of the subcommand."""
    assert main(list(arguments)) == 1
    error_line(capsys.readouterr().err, f"hatnet-dense {arguments[0]}", *named)


def test_a_checkpoint_of_another_variant_is_refused(shapes, run_of, tmp_path, capsys):
    checkpoint, config = last_checkpoint(run_of("retinanet")), str(SHAPES / "retinanet.py")
    small = ["model.backbone.variant=hatnet_small", "model.neck.in_channels=[64,128,320,512]"]
    given = options("retinanet", *small)
    at = ["--work-dir", str(tmp_path)]
    named = ["backbone.model.stages.1.blocks.2.attn.norm.weight"]  # Tiny has two blocks there
    refused(capsys, named, "test", config, checkpoint, *at, *given)
    refused(capsys, named, "train", config, "--resume", checkpoint, *at, *given)
    refused(capsys, named, "train", config, *at, *given, f"load_from={checkpoint}")
    images = [str(shapes / "val2017"), "--out", str(tmp_path / "out")]
    refused(capsys, named, "predict", config, checkpoint, *images, *given)
    assert not (tmp_path / "out").exists()


def test_a_new_run_may_start_from_a_checkpoint_with_other_classes(shapes, run_of, tmp_path):
    checkpoint = last_checkpoint(run_of("retinanet"))
    more = ["model.bbox_head.num_classes=2", f"load_from={checkpoint}", "train_cfg.max_epochs=1", "val_cfg=None"]
    more += ["train_dataloader.dataset.metainfo.classes=('disk','square')"]
    more += ["val_dataloader=None", "val_evaluator=None"]
    command = ["train", str(SHAPES / "retinanet.py"), "--work-dir", str(tmp_path)]
    assert main([*command, *options("retinanet", *more)]) == 0
    (log,) = tmp_path.glob("*/*.log")
    (line,) = [line for line in log.read_text().splitlines() if "WARNING" in line and "retina_cls.weight" in line]
    check(line, "bbox_head.retina_cls.weight")
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    after = torch.load(last_checkpoint(tmp_path), weights_only=True)["state_dict"]
    name = "backbone.model.stem.conv2.weight"
    # four steps of AdamW move a weight by at most four times the learning rate and its decay
    torch.testing.assert_close(after[name], before[name], rtol=1e-3, atol=4.1 * 2e-4)
    assert (after[name] != before[name]).any()


def test_data_that_cannot_be_used_ends_training_before_its_first_step(shapes, tmp_path, capsys):
    def training(head, named, *more):
        work_dir = ["--work-dir", str(tmp_path / "run")]
        refused(capsys, named, "train", str(SHAPES / f"{head}.py"), *work_dir, *options(head, *more))

    absent = "train_dataloader.dataset.ann_file=annotations/absent.json"
    training("retinanet", [shapes / "annotations" / "absent.json"], absent)
    others = "train_dataloader.dataset.metainfo.classes=('cat','dog')"
    training("retinanet", ["annotations/instances_train2017.json", ("cat", "dog")], others)
    classes = ["training data", "disk, square, triangle", 3, "model.bbox_head.num_classes", 80]
    training("retinanet", classes, "model.bbox_head.num_classes=80")
    image = shapes / "train2017" / "000003.jpg"
    image.rename(tmp_path / "000003.jpg")
    try:
        training("retinanet", ["training data", image])
    finally:
        (tmp_path / "000003.jpg").rename(image)
    labels = shapes / "annotations" / "training" / "000005.png"
    content = labels.read_bytes()
    unknown = np.array(Image.open(labels))
    unknown[20:40, 20:40] = 9
    try:
        Image.fromarray(np.ones((50, 60), dtype=np.uint8)).save(labels)
        training("semfpn", [labels, "60×50"])
        Image.fromarray(unknown).save(labels)
        training("semfpn", [labels, 8, "reduce_zero_label", 0, 3, 255])
    finally:
        labels.write_bytes(content)
    assert not list((tmp_path / "run").glob("*.pth"))
