"""Find, read and check configs: those of this package and any other of MMDetection and MMSegmentation.

The files in ``configs/`` follow the naming scheme of these libraries: ``t``, ``s``, ``m`` and ``l`` are the four
variants, ``1x`` is 12 epochs, ``4xb4`` is 4 processes with 4 images each, ``80k`` is the number of iterations.
Each inherits a model with its data and schedule (such as ``_base_/mask-rcnn.py``) and a backbone with its channels
(such as ``_base_/hatnet-s.py``). Start reading at :func:`load_config`.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import get_installed_path

from hatnet_core.variants import model_arguments
from hatnet_dense.backbone import check_out_indices
from hatnet_dense.compat import require
from hatnet_dense.errors import said
from hatnet_dense.options import check_option, check_variables

CONFIGS = Path(__file__).parent / "configs"
"""Folder of the configs of this package."""

LIBRARIES = ("mmdet", "mmseg")
"""Supported values of ``default_scope``."""

HOOKS = ("PlainCheckpointHook", "DataCheckHook")
"""Hooks that every config gets; the configs of this package name them already."""

if "mmsegmentation" not in packages_distributions().get("mmseg", ["mmsegmentation"]):
    # A fork: MMEngine would look up the configs of "mmseg::" in a distribution with the official name.
    MODULE2PACKAGE["mmseg"] = "mmseg"


def config_names() -> list[str]:
    """List the configs of this package, sorted."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def config_path(name: str | Path) -> Path:
    """Find the file of a config.

    Args:
        name: a path; the name of a config of this package, with or without ``.py``; or a config of the libraries, such
            as ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py``.

    Raises:
        ValueError: if it does not exist, with similar names.
    """
    library, _, inside = str(name).partition("::")
    if inside:
        return _library_path(library, inside)
    ours = CONFIGS / f"{Path(name).name.removesuffix('.py')}.py"
    if Path(name).is_file():
        return Path(name)
    if ours.is_file() and Path(name).parent == Path():  # a name with a folder is a path only
        return ours
    alike = difflib.get_close_matches(ours.stem, config_names(), n=3, cutoff=0.4)
    known = f", such as {', '.join(alike)}" if alike else ""
    raise ValueError(f"CONFIG must be a file or a name that 'hatnet-dense configs' lists{known}, got {name}")


def _library_path(library: str, inside: str) -> Path:
    if library not in LIBRARIES:
        raise ValueError(f"the library before '::' must be {' or '.join(LIBRARIES)}, got {library!r}")
    require(library)
    configs = Path(get_installed_path(library)).resolve() / ".mim" / "configs"
    path = (configs / inside).resolve()
    if not path.is_relative_to(configs) or not path.is_file():
        raise ValueError(f"a config of {library} must be a file in {configs}, got {inside}")
    return path


def load_config(name: str | Path, options: Sequence[str] = ()) -> Config:
    """Read a config, merge options, check it, and add the hooks of this package.

    Args:
        name: see :func:`config_path`.
        options: ``KEY=VALUE`` strings in MMEngine's syntax that replace values of the config, such as
            ``train_cfg.max_epochs=1``.

    Raises:
        ValueError: if the file cannot be read, is for another library, or an option is malformed.
        ImportError: if its library is missing or broken.
    """
    path = config_path(name)
    try:
        config = Config.fromfile(path)
    except (ImportError, ValueError):
        raise
    except Exception as error:  # a config is Python and may raise anything
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    _merge(config, options)
    library = config.get("default_scope")
    if library not in LIBRARIES or not isinstance(config.get("model"), dict):
        raise ValueError(
            f"{path}: default_scope must be {' or '.join(LIBRARIES)} and model a dict, "
            f"got {library!r} and {type(config.get('model')).__name__}"
        )
    require(library)
    if "::" not in str(name):  # some configs of the libraries have unused variables
        check_variables(config, path)
    _add_hooks(config)
    check_channels(config.model)
    return config


def demand(config: Config, what: str, *keys: str) -> None:
    """Require keys of a config.

    Args:
        config: from :func:`load_config`.
        what: the command or option that needs the keys, for the message.
        keys: paths such as ``test_dataloader.dataset``.

    Raises:
        ValueError: naming the first key that is missing or None.
    """
    for key in keys:
        value: Any = config
        for i, part in enumerate(key.split("."), 1):
            value = value.get(part) if isinstance(value, Config | dict) else None
            if value is None:
                raise ValueError(f"{'.'.join(key.split('.')[:i])} must be in the config for {what}, got None")


def innermost(dataset: Any) -> Any:
    """Unwrap the config of a dataset; of ConcatDataset, RepeatDataset and the like, return the first one inside."""
    while isinstance(dataset, dict) and ("datasets" in dataset or isinstance(dataset.get("dataset"), dict)):
        dataset = dataset["datasets"][0] if dataset.get("datasets") else dataset.get("dataset")
    return dataset


def check_channels(model: Mapping[str, Any]) -> None:
    """Check that the module after a HAT-Net expects the channels of its maps.

    The configs of this package cannot go wrong: they take variant and channels from one file. A variant or
    ``out_indices`` changed elsewhere can, and the libraries would fail late or without a message.

    Raises:
        ValueError: naming both lists of channels, or an invalid variant or ``out_indices``.
    """
    key = next((key for key in ("neck", "panoptic_head", "decode_head") if model.get(key)), "")
    backbone, reader = model.get("backbone"), model.get(key)
    if not isinstance(backbone, Mapping) or not isinstance(reader, Mapping):
        return
    stated = reader.get("in_channels")
    if backbone.get("type") != "HATNetBackbone" or not isinstance(stated, list | tuple):
        return
    variant = backbone.get("variant", "hatnet_tiny")
    dims = model_arguments(variant)["embed_dims"]
    given = [dims[i] for i in check_out_indices(backbone.get("out_indices", (0, 1, 2, 3)))]
    read = reader.get("in_index", range(len(given))) if key == "decode_head" else range(len(given))
    if list(stated) != [given[i] for i in read if i < len(given)]:
        raise ValueError(f"model.{key}.in_channels must be {given}, the channels of {variant}, got {list(stated)}")


def _add_hooks(config: Config) -> None:
    hooks = config.get("custom_hooks") or []
    if not isinstance(hooks, list | tuple) or not all(isinstance(hook, dict) and "type" in hook for hook in hooks):
        raise ValueError(f"custom_hooks must be a list of dicts with a type, got {hooks!r}")
    present = [hook["type"] for hook in hooks]
    config.custom_hooks = [*hooks, *(ConfigDict(type=hook) for hook in HOOKS if hook not in present)]


def _merge(config: Config, options: Sequence[str]) -> None:
    """Merge ``KEY=VALUE`` strings into a config."""
    parse = DictAction(["--cfg-options"], dest="values")
    for option in options:
        key, equals, _ = option.partition("=")
        if not key or not equals:
            raise ValueError(f"--cfg-options must be KEY=VALUE, got {option!r}")
        parsed = argparse.Namespace()
        try:
            parse(argparse.ArgumentParser(), parsed, [option])
        except AssertionError as error:  # unbalanced brackets
            raise ValueError(f"--cfg-options must be KEY=VALUE, got {option!r}: {error}") from error
        check_option(config, key)
        try:
            config.merge_from_dict(parsed.values)
        except Exception as error:  # an index beyond the end of a list, a key inside of a number
            raise ValueError(f"--cfg-options must fit the config, got {option}: {said(error)}") from error
