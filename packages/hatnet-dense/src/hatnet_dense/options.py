"""Refuse keys of a config that nothing reads, and suggest keys that work.

Variables of a config file, such as ``data_root``, are substituted when MMEngine reads the file; setting them later has
no effect. Configs for MMDetection 2 and MMSegmentation 0 have other keys than today's.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RENAMED = {
    "optimizer": "optim_wrapper.optimizer",
    "optimizer_config.grad_clip": "optim_wrapper.clip_grad",
    "optimizer_config": "optim_wrapper",
    "lr_config": "param_scheduler",
    "runner": "train_cfg",
    "total_epochs": "train_cfg.max_epochs",
    "epochs": "train_cfg.max_epochs",
    "max_epochs": "train_cfg.max_epochs",
    "max_iters": "train_cfg.max_iters",
    "evaluation.interval": "train_cfg.val_interval",
    "evaluation": "val_evaluator",
    "checkpoint_config": "default_hooks.checkpoint",
    "log_config": "default_hooks.logger",
    "data.samples_per_gpu": "train_dataloader.batch_size",
    "data.workers_per_gpu": "train_dataloader.num_workers",
    "data.train": "train_dataloader.dataset",
    "data.val": "val_dataloader.dataset",
    "data.test": "test_dataloader.dataset",
    "batch_size": "train_dataloader.batch_size",
    "num_workers": "train_dataloader.num_workers",
    "data": "train_dataloader",
    "resume_from": "--resume",
    "samples_per_gpu": "train_dataloader.batch_size",
    "workers_per_gpu": "train_dataloader.num_workers",
    "img_scale": "train_pipeline in a config file",
    "lr": "optim_wrapper.optimizer.lr",
    "seed": "randomness.seed",
    "cudnn_benchmark": "env_cfg.cudnn_benchmark",
    "dist_params": "env_cfg.dist_cfg",
    "launcher": "--launcher",
    "fp16": "--amp",
    "custom_imports": "custom_imports in a config file",
}
"""Keys of other versions and libraries, and their present names; the first match counts."""

MORE = {"runner_type", "model_wrapper_cfg", "compile", "sync_bn", "find_unused_parameters", "activation_checkpointing"}
MORE |= {"efficient_conv_bn_eval", "init_weights_for_test_or_val"}
"""Keys that are read although they are not arguments of a runner."""

FIXED = {"cfg", "launcher"}
"""Arguments of a runner that are not read from the config."""

OPTIONAL = {
    "env_cfg": {"cudnn_benchmark", "dist_cfg", "mp_cfg", "resource_limit"},
    "auto_scale_lr": {"base_batch_size", "enable"},
    "paramwise_cfg": {
        *("base_total_batch_size", "bias_decay_mult", "bias_lr_mult", "bypass_duplicate", "custom_keys"),
        *(
            "dcn_offset_lr_mult",
            "decay_rate",
            "decay_type",
            "dwconv_decay_mult",
            "flat_decay_mult",
            "layer_decay_rate",
        ),
        *("norm_decay_mult", "num_layers"),
    },
    "test_cfg": {
        *("crop_size", "iou_threshold", "mask_thr_binary", "max_per_img", "min_bbox_size", "mode", "nms", "nms_pre"),
        *("rcnn", "rpn", "score_thr", "stride"),
    },
}
"""Keys that may be added to parts of a config without a class; a class refuses unknown keys itself."""

ALIKE = 0.8
"""Similarity from which a new key counts as mistyped."""


def check_option(config: Mapping[str, Any], key: str) -> None:
    """Refuse a key of ``--cfg-options`` that has no effect.

    Args:
        config: the config before the option is merged.
        key: a path such as ``train_cfg.max_epochs``.

    Raises:
        ValueError: naming keys that work.
    """
    root, _, rest = key.partition(".")
    if root == "data_preprocessor" and "data_preprocessor" in (config.get("model") or {}):
        raise _unread(key, [f"model.{key}"])
    if root not in read_keys():
        raise _unread(key, suggestions(config, key))
    parent: Any = config.get(root)
    path = root
    for part in rest.split(".") if rest else []:
        if not isinstance(parent, Mapping) or path.endswith("custom_keys"):
            return
        if part not in parent:
            optional = OPTIONAL.get(path.rpartition(".")[2])
            if optional is not None and "type" not in parent and part not in optional:
                close = difflib.get_close_matches(part, sorted({*optional, *parent}), 3, ALIKE / 2)
                raise _unread(key, [f"{path}.{name}" for name in close or sorted({*optional, *parent})])
            alike = [] if "type" in parent else difflib.get_close_matches(part, list(map(str, parent)), 1, ALIKE)
            if alike:
                raise _unread(key, [f"{path}.{alike[0]}{key[len(path) + 1 + len(part) :]}"])
            return
        parent, path = parent[part], f"{path}.{part}"


def check_variables(config: Mapping[str, Any], path: Path) -> None:
    """Refuse variables of a config file that look like settings and have no effect.

    Args:
        config: the resolved config.
        path: its file; only Python files have variables.

    Raises:
        ValueError: naming keys that work.
    """
    try:
        tree = ast.parse(path.read_text() if path.suffix == ".py" else "")
    except SyntaxError:  # a template {{ }} of MMEngine outside of a string
        return
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    assigned = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    for target in assigned:
        if isinstance(target, ast.Name) and target.id not in {"custom_imports", *used, *read_keys()}:
            names = suggestions(config, target.id)
            if names:
                raise ValueError(f"{path}: {target.id} has no effect; the key must be {_joined(names)}")


def suggestions(config: Mapping[str, Any], key: str) -> list[str]:
    """Suggest keys for one that nothing reads, the most likely first."""
    for old, new in RENAMED.items():
        if key == old or key.startswith(f"{old}."):
            return [new + key[len(old) :]]
    root, _, rest = key.partition(".")
    mistyped = difflib.get_close_matches(root, read_keys(), 1, ALIKE)
    if mistyped:
        return [f"{mistyped[0]}.{rest}".rstrip(".")]
    parts = key.split(".")
    read = list(_paths({key: value for key, value in config.items() if key in read_keys()}))
    for start in range(len(parts)):
        found = [".".join(path) for path in read if path[-len(parts[start:]) :] == parts[start:]]
        if found:
            return sorted(found, key=lambda path: path.count("."))[:3]
    return []


def read_keys() -> list[str]:
    """List the top-level keys of a config that MMEngine or this package reads."""
    from mmengine.runner import FlexibleRunner, Runner  # takes seconds

    arguments = {name for runner in (Runner, FlexibleRunner) for name in inspect.signature(runner).parameters}
    return sorted((arguments | MORE) - FIXED)


def _unread(key: str, names: Sequence[str]) -> ValueError:
    return ValueError(f"--cfg-options must name a key that is read, such as {_joined(names)}, got {key}")


def _joined(names: Sequence[str]) -> str:
    return " or ".join(names) or f"one in {', '.join(read_keys())}"


def _paths(value: Any) -> Iterator[list[str]]:
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, item in items:
        yield [str(key)]
        if isinstance(item, Mapping | list | tuple):
            yield from ([str(key), *path] for path in _paths(item))
