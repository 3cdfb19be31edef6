"""The configs that come with the package, and any other of MMDetection and MMSegmentation, ready to run.

The files under ``configs/`` are in the style and under the names of those libraries: ``t``, ``s``, ``m``, ``l`` are
the four variants, ``1x`` is 12 epochs, ``4xb4`` is 4 processes with 4 images each, ``80k`` is iterations.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import get_installed_path

from hatnet_core import create_model
from hatnet_dense.backbone import check_out_indices
from hatnet_dense.compat import require
from hatnet_dense.errors import said
from hatnet_dense.options import check_option, check_variables

CONFIGS = Path(__file__).parent / "configs"
"""Where the configs of this package lie."""

LIBRARIES = ("mmdet", "mmseg")
"""What a config may be for, its ``default_scope``."""

HOOKS = ("PlainCheckpointHook", "DataCheckHook")
"""What our own configs have under ``custom_hooks``; put into others, too."""

if "mmsegmentation" not in packages_distributions().get("mmseg", ["mmsegmentation"]):
    # a fork: MMEngine would look for what is behind "mmseg::" in a distribution of the official name
    MODULE2PACKAGE["mmseg"] = "mmseg"


def config_names() -> list[str]:
    """The configs of this package, in order."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def config_path(name: str | Path) -> Path:
    """The file of a config.

    Args:
        name: a path; the name of a config of this package, with or without ``.py``; or one of the libraries' own, as
            ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``.

    Raises:
        ValueError: if there is none, with the names that are alike.
    """
    library, _, inside = str(name).partition("::")
    if inside:
        return _library_path(library, inside)
    ours = CONFIGS / f"{Path(name).name.removesuffix('.py')}.py"
    for path in (Path(name), ours):
        if path.is_file() and (
            path == Path(name) or Path(name).parent == Path()
        ):  # a folder is meant as it is written
            return path
    alike = difflib.get_close_matches(ours.stem, config_names(), n=3, cutoff=0.4)
    known = f" such as {', '.join(alike)}" if alike else ""
    raise ValueError(f"no config {name}: expected a file, or a name that 'hatnet-dense configs' lists{known}")


def _library_path(library: str, inside: str) -> Path:
    if library not in LIBRARIES:
        raise ValueError(f"no library {library!r}: expected {' or '.join(LIBRARIES)} before '::'")
    require(library)
    configs = Path(get_installed_path(library)).resolve() / ".mim" / "configs"
    path = (configs / inside).resolve()
    if not path.is_relative_to(configs) or not path.is_file():
        raise ValueError(f"no config {inside} in {library}: expected a file below {configs}")
    return path


def load_config(name: str | Path, options: Sequence[str] = ()) -> Config:
    """Read a config and prepare it for this package.

    Args:
        name: as for :func:`config_path`.
        options: ``KEY=VALUE`` texts in MMEngine's form, such as ``train_cfg.max_epochs=1``, over its values.

    Returns:
        The config, with the hooks of this package.

    Raises:
        ValueError: if it cannot be read, is for another library, or an option is malformed.
        ImportError: if the library it is for is absent or broken.
    """
    path = config_path(name)
    try:
        config = Config.fromfile(path)
    except (ImportError, ValueError):
        raise
    except Exception as error:  # a config is Python, and may raise anything
        raise ValueError(f"cannot read config {path}: {type(error).__name__}: {error}") from error
    _merge(config, options)
    library = config.get("default_scope")
    if library not in LIBRARIES or not isinstance(config.get("model"), dict):
        raise ValueError(
            f"{path} is no config of {' or '.join(LIBRARIES)}: expected model and default_scope, "
            f"got {library!r} and a model of type {type(config.get('model')).__name__}"
        )
    require(library)
    if "::" not in str(name):  # some of the libraries' own have leftovers
        check_variables(config, path)
    hooks = config.get("custom_hooks") or []
    if not isinstance(hooks, list | tuple) or not all(isinstance(hook, dict) and "type" in hook for hook in hooks):
        raise ValueError(f"custom_hooks must be a list of dicts with a type, got {hooks!r}")
    hooks = list(hooks)
    hooks += [ConfigDict(type=hook) for hook in HOOKS if hook not in [given["type"] for given in hooks]]
    config.custom_hooks = hooks
    check_channels(config.model)
    return config


def demand(config: Config, what: str, *keys: str) -> None:
    """Make sure that a config says what is needed.

    Args:
        config: of :func:`load_config`.
        what: what needs the keys, for the message.
        keys: paths such as ``test_dataloader.dataset``.

    Raises:
        ValueError: naming the first key that is absent or None.
    """
    for key in keys:
        value: Any = config
        for i, part in enumerate(key.split("."), 1):
            value = value.get(part) if isinstance(value, Config | dict) else None
            if value is None:
                raise ValueError(f"the config has no {'.'.join(key.split('.')[:i])}, which {what} needs")


def innermost(dataset: Any) -> Any:
    """The config of a dataset, of the first one where it is wrapped (ConcatDataset, RepeatDataset, …)."""
    while isinstance(dataset, dict) and ("datasets" in dataset or isinstance(dataset.get("dataset"), dict)):
        dataset = dataset["datasets"][0] if dataset.get("datasets") else dataset.get("dataset")
    return dataset


def check_channels(model: Mapping[str, Any]) -> None:
    """Compare the maps of a HAT-Net with what the module behind it is told to take.

    Raises:
        ValueError: naming both lists of channels, or what is wrong with the variant or its ``out_indices``.
    """
    backbone = model.get("backbone")
    if not isinstance(backbone, Mapping) or backbone.get("type") != "HATNetBackbone":
        return
    key = next((key for key in ("neck", "panoptic_head", "decode_head") if model.get(key)), None)
    stated = model[key].get("in_channels") if key is not None and isinstance(model[key], Mapping) else None
    if not isinstance(stated, list | tuple):
        return
    variant = backbone.get("variant", "hatnet_tiny")
    widths = [info["num_chs"] for info in create_model(variant, num_classes=0).feature_info]
    given = [widths[i] for i in check_out_indices(backbone.get("out_indices", (0, 1, 2, 3)))]
    taken = model[key].get("in_index", range(len(given))) if key == "decode_head" else range(len(given))
    if list(stated) != [given[i] for i in taken]:
        raise ValueError(f"model.{key}.in_channels is {list(stated)}: expected {given}, the channels of {variant}")


def _merge(config: Config, options: Sequence[str]) -> None:
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise ValueError(f"--cfg-options must be KEY=VALUE, got {option!r}")
        try:
            parsed = DictAction._parse_iterable(value)
        except AssertionError as error:  # brackets that do not match
            raise ValueError(f"--cfg-options must be KEY=VALUE, got {option!r}: {error}") from error
        check_option(config, key)
        try:
            config.merge_from_dict({key: parsed})
        except Exception as error:  # a list that is too short, a value that is no dict
            raise ValueError(f"--cfg-options {option} does not fit the config: {said(error)}") from error
