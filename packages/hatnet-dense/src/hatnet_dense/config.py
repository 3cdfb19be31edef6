"""The configs that come with the package, and any other of MMDetection and MMSegmentation, ready to run.

The files under ``configs/`` are in the style and under the names of those libraries: ``t``, ``s``, ``m``, ``l`` are
the four variants, ``1x`` is 12 epochs, ``4xb4`` is 4 processes with 4 images each, ``80k`` is iterations.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.utils import get_installed_path

from hatnet_dense.compat import require

CONFIGS = Path(__file__).parent / "configs"
"""Where the configs of this package lie."""

LIBRARIES = ("mmdet", "mmseg")
"""What a config may be for, its ``default_scope``."""

HOOKS = ("PlainCheckpointHook", "DataCheckHook")
"""What our own configs have under ``custom_hooks``; put into others, too."""


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
    config.merge_from_dict(_parsed(options))
    library = config.get("default_scope")
    if library not in LIBRARIES or "model" not in config:
        raise ValueError(
            f"{path} is no config of {' or '.join(LIBRARIES)}: expected model and default_scope, got {library!r}"
        )
    require(library)
    hooks = list(config.get("custom_hooks") or [])
    hooks += [ConfigDict(type=hook) for hook in HOOKS if hook not in [given["type"] for given in hooks]]
    config.custom_hooks = hooks
    return config


def _parsed(options: Sequence[str]) -> dict[str, object]:
    parsed: dict[str, object] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise ValueError(f"--cfg-options must be KEY=VALUE, got {option!r}")
        try:
            parsed[key] = DictAction._parse_iterable(value)
        except AssertionError as error:  # brackets that do not match
            raise ValueError(f"--cfg-options must be KEY=VALUE, got {option!r}: {error}") from error
    return parsed
