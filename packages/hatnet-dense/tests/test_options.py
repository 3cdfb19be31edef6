"""Options that nothing reads: refused, with the names that work."""

import functools
import inspect
import re

import pytest
from mmengine.runner import FlexibleRunner, Runner

from hatnet_dense.cli import main
from hatnet_dense.config import config_path, load_config
from hatnet_dense.options import FIXED, check_option, read_keys, suggestions
from hatnet_testing import error_line, raises

DETECTOR = "retinanet_hatnet-t_fpn_1x_coco"
SEGMENTER = "semfpn_hatnet-t_4xb4-80k_ade20k-512x512"


read = functools.cache(load_config)  # MMEngine takes a second for each


@pytest.mark.parametrize(
    ("option", "works"),
    [
        ("max_epochs=1", "train_cfg.max_epochs"),
        ("optimizer.lr=0.5", "optim_wrapper.optimizer.lr"),
        ("data.samples_per_gpu=4", "train_dataloader.batch_size"),
        ("data.workers_per_gpu=0", "train_dataloader.num_workers"),
        ("data.train.ann_file=a.json", "train_dataloader.dataset.ann_file"),
        ("lr=0.5", "optim_wrapper.optimizer.lr"),
        ("optim_wraper.optimizer.lr=0.5", "optim_wrapper.optimizer.lr"),
        ("data_root=data/mine/", "train_dataloader.dataset.data_root"),
        ("milestones=[1]", "param_scheduler.1.milestones"),
        ("num_classes=3", "model.bbox_head.num_classes"),
        ("env_cfg.cudnn_benchmrk=True", "env_cfg.cudnn_benchmark"),
        ("model.test_cfg.score_th=0.3", "model.test_cfg.score_thr"),
        ("train_dataloader.dataset.filter_cfg.min_siz=1", "train_dataloader.dataset.filter_cfg.min_size"),
        ("model.test_cfg.score_threshold=0.9", "model.test_cfg.score_thr"),
        ("env_cfg.foo=1", "env_cfg.cudnn_benchmark"),
        ("resume_from=epoch_1.pth", "--resume"),
        ("launcher=pytorch", "--launcher"),
        ("custom_imports.imports=['mine']", "config file"),
        ("anything=1", "train_dataloader"),
    ],
)
def test_an_option_that_nothing_reads_is_refused_with_the_name_that_works(option, works):
    key = option.partition("=")[0]
    with raises(ValueError, key, works):
        check_option(read(DETECTOR), key)


def test_the_preprocessor_of_a_segmenter_is_that_of_its_model():
    with raises(ValueError, "data_preprocessor.size", "model.data_preprocessor.size"):
        check_option(read(SEGMENTER), "data_preprocessor.size")


def test_the_command_refuses_it_with_status_1(tmp_path, capsys):
    assert main(["train", DETECTOR, "--work-dir", str(tmp_path / "run"), "--cfg-options", "max_epochs=1"]) == 1
    error_line(capsys.readouterr().err, "hatnet-dense train", "max_epochs", "train_cfg.max_epochs")
    assert not (tmp_path / "run").exists()


def test_new_keys_that_are_read_are_taken():
    config = load_config(DETECTOR, ["randomness.seed=3", "model.backbone.frozen_stages=1", "load_from=None"])
    assert config.randomness.seed == 3
    assert config.model.backbone.frozen_stages == 1


@pytest.mark.parametrize(("name", "value"), [("data_root", "'mine/'"), ("total_epochs", "1")])
def test_a_variable_of_a_config_that_it_does_not_use_is_refused_with_its_file(name, value, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(f"_base_ = {str(config_path(DETECTOR))!r}\n{name} = {value}\n")
    with raises(ValueError, name, path):
        load_config(path)
    path.write_text(path.read_text() + f"work_dir = str({name})\n")
    load_config(path)


def test_what_nothing_resembles_has_no_suggestion():
    assert suggestions({"model": {}}, "zzz") == []


@pytest.mark.parametrize("runner", [Runner, FlexibleRunner])
def test_every_key_that_a_runner_of_mmengine_reads_is_known(runner):
    source = inspect.getsource(inspect.getmodule(runner))
    keys = set(re.findall(r"\bcfg\.get\(\s*'(\w+)'", source)) | set(re.findall(r"\bcfg\['(\w+)'\]", source))
    assert "train_dataloader" in keys
    assert keys - FIXED <= set(read_keys())
