"""What the commands of ``hatnet-dense`` do with their options; the options themselves are in ``hatnet_dense_cli``.

The libraries are imported by the commands that need them: ``doctor`` is for where they fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from hatnet_dense.__about__ import __version__
from hatnet_dense.compat import examine, usable
from hatnet_dense_cli import main

__all__ = ["configs", "doctor", "flops", "main", "predict", "test", "train"]

MARKS = {"ok": "ok", "absent": "-", "broken": "BROKEN"}
"""How the states of a finding are shown."""


def train(options: argparse.Namespace) -> None:
    """``hatnet-dense train``."""
    from hatnet_dense.config import load_config

    config = load_config(options.config, options.cfg_options)
    from hatnet_dense import runs  # after the libraries are found to be there

    work_dir = _work_dir(options, config)
    last = runs.train(
        config, work_dir, options.resume, options.amp, options.auto_scale_lr, options.launcher, options.zero_stage
    )
    if last is not None:
        _say(f"trained: {last}")


def test(options: argparse.Namespace) -> None:
    """``hatnet-dense test``."""
    from hatnet_dense.config import load_config

    out = None if options.out is None else _file("--out", options.out)
    show_dir = None if options.show_dir is None else _folder("--show-dir", options.show_dir)
    config = load_config(options.config, options.cfg_options)
    from hatnet_dense import runs

    work_dir = _work_dir(options, config)
    metrics = runs.evaluate(config, Path(options.checkpoint), work_dir, show_dir, options.launcher)
    if metrics is None:
        return
    _say(json.dumps(metrics, indent=2))
    if out is not None:
        runs.write_metrics(metrics, out)


def predict(options: argparse.Namespace) -> None:
    """``hatnet-dense predict``."""
    from hatnet_dense.config import load_config

    out = _folder("--out", options.out)
    images = [Path(image) for image in options.images]
    config = load_config(options.config, options.cfg_options)
    from hatnet_dense.predict import predict as predict_images

    record = predict_images(config, Path(options.checkpoint), images, out, options.score_threshold, options.device)
    _say(f"predictions of {len(record['images'])} images: {out / 'predictions.json'}")


def flops(options: argparse.Namespace) -> None:
    """``hatnet-dense flops``."""
    from hatnet_dense.config import load_config
    from hatnet_dense.flops import count

    height, width = options.size
    row = {"config": options.config, "height": height, "width": width}
    row |= count(load_config(options.config, options.cfg_options), height, width)
    if options.format == "json":
        _say(json.dumps(row, indent=2))
        return
    _say(f"{options.config} at {height}×{width}, one multiply-add is one FLOP")
    for prefix, name in (("", "whole model"), ("backbone_", "backbone")):
        _say(
            f"{name:>12}: {row[prefix + 'params'] / 1e6:.2f} M parameters, {row[prefix + 'flops_complete'] / 1e9:.1f} "
            f"GFLOPs, {row[prefix + 'flops_paper'] / 1e9:.1f} without the matrix products of the attention"
        )


def configs(options: argparse.Namespace) -> None:
    """``hatnet-dense configs``."""
    from hatnet_dense.config import config_names, config_path

    for name in options.names or config_names():
        _say(str(config_path(name) if options.names else name))


def doctor(options: argparse.Namespace) -> int:
    """``hatnet-dense doctor``."""
    findings = examine()
    if options.format == "json":
        _say(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return 0 if usable(findings) else 1
    _say(f"hatnet-dense {__version__}, Python {sys.version.split()[0]}")
    for finding in findings:
        _say(f"{finding.name:>14}  {MARKS[finding.state]:<6}  {finding.distribution}")
        if finding.state == "broken":
            _say(f"{'':>14}  {finding.reason}")
    for finding in findings:
        if finding.state == "broken":
            _say(f"to mend {finding.name}:\n  {finding.command}")
    optional = [finding for finding in findings if finding.state == "absent"]
    for finding in optional:
        _say(f"to add {finding.name}:\n  {finding.command}")
    _say("ready" if usable(findings) else "not ready: mend what is broken, from above to below")
    return 0 if usable(findings) else 1


def _say(text: str) -> None:
    """Print for whoever reads; a reader that has seen enough and went away ends nothing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # and the interpreter's own flush at its end is not to find it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _work_dir(options: argparse.Namespace, config: Any) -> Path:
    """From the command line, or the config, or named after it: the libraries' own order."""
    if options.work_dir is not None:
        return _folder("--work-dir", options.work_dir)
    stem = Path(options.config).name.removesuffix(".py")
    return _folder("work_dir", str(config.get("work_dir") or Path("work_dirs") / stem))


def _folder(option: str, text: str) -> Path:
    """The folder that an option names, which may have to be made."""
    path = Path(text)
    if not text or any(place.exists() and not place.is_dir() for place in (path, *path.parents)):
        raise ValueError(f"{option} must be a folder, got {text or repr(text)}")
    return path


def _file(option: str, text: str) -> Path:
    """The file that an option names, to be written."""
    path = Path(text)
    if not text or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{option} must be a file in a folder that exists, got {text or repr(text)}")
    return path
