"""What the commands of ``hatnet-dense`` do with their options; the options themselves are in ``hatnet_dense_cli``.

The libraries are imported by the commands that need them: ``doctor`` is for where they fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from hatnet_core.commands import say, writable_file, writable_folder
from hatnet_dense.__about__ import __version__
from hatnet_dense.compat import examine, usable

SHOWN = 50
"""Problems that ``check`` prints."""

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
        say(f"trained: {last}")


def test(options: argparse.Namespace) -> None:
    """``hatnet-dense test``."""
    from hatnet_dense.config import load_config

    out = None if options.out is None else writable_file(options.out)
    show_dir = None if options.show_dir is None else writable_folder(options.show_dir, "--show-dir")
    config = load_config(options.config, options.cfg_options)
    from hatnet_dense import runs

    work_dir = _work_dir(options, config)
    metrics = runs.evaluate(config, options.checkpoint, work_dir, show_dir, options.launcher)
    if metrics is None:
        return
    if out is not None:
        runs.write_metrics(metrics, out)
    say(json.dumps(metrics, indent=2))


def predict(options: argparse.Namespace) -> None:
    """``hatnet-dense predict``."""
    from hatnet_dense.config import load_config

    out = writable_folder(options.out)
    config = load_config(options.config, options.cfg_options)
    from tqdm import tqdm

    from hatnet_dense.annotations import counted
    from hatnet_dense.predict import predict as predict_images

    strict = options.on_bad_image == "strict"
    bad = 0

    def on_bad(reason: str) -> None:
        nonlocal bad
        bad += 1
        kind = "error" if strict else "warning: skipped"
        tqdm.write(f"{options.parser.prog}: {kind}: {reason}", file=sys.stderr)  # above the progress bar

    record = predict_images(
        config, options.checkpoint, options.images, out, options.score_threshold, options.device, on_bad
    )
    done = len(record["images"])
    if done:
        say(f"predictions of {counted(done, 'image', 'images')}: {out / 'predictions.json'}")
    if bad and (strict or not done):
        raise ValueError(f"{bad} of {bad + done} images could not be read or predicted")


def check(options: argparse.Namespace) -> int:
    """``hatnet-dense check``."""
    from hatnet_dense.annotations import counted
    from hatnet_dense.config import load_config
    from hatnet_dense.data_check import survey_config

    surveys = survey_config(load_config(options.config, options.cfg_options))
    problems = [f"{found.name}: {problem}" for found in surveys for problem in found.problems]
    for found in surveys:
        say(str(found))
        for name in found.shares():
            say(f"  {name}")
    for problem in problems[:SHOWN]:
        say(f"problem: {problem}")
    if len(problems) > SHOWN:
        say(f"… and {len(problems) - SHOWN:,} more")
    say(counted(len(problems), "problem", "problems") if problems else "no problems")
    return 1 if problems else 0


def flops(options: argparse.Namespace) -> None:
    """``hatnet-dense flops``."""
    from hatnet_dense.config import load_config
    from hatnet_dense.flops import count

    height, width = options.size
    row = {"config": options.config, "height": height, "width": width}
    row |= count(load_config(options.config, options.cfg_options), height, width)
    if options.format == "json":
        say(json.dumps(row, indent=2))
        return
    say(f"{options.config} at {height}×{width}, one multiply-add is one FLOP")
    for prefix, name in (("", "whole model"), ("backbone_", "backbone")):
        say(
            f"{name:>12}: {row[prefix + 'params'] / 1e6:.2f} M parameters, {row[prefix + 'flops_complete'] / 1e9:.1f} "
            f"GFLOPs, {row[prefix + 'flops_paper'] / 1e9:.1f} without the matrix products of the attention"
        )


def configs(options: argparse.Namespace) -> None:
    """``hatnet-dense configs``."""
    from hatnet_dense.config import config_names, config_path

    for name in options.names or config_names():
        say(str(config_path(name) if options.names else name))


def doctor(options: argparse.Namespace) -> int:
    """``hatnet-dense doctor``."""
    findings = examine()
    if options.format == "json":
        say(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return 0 if usable(findings) else 1
    say(f"hatnet-dense {__version__}, Python {sys.version.split()[0]}")
    for finding in findings:
        say(f"{finding.name:>14}  {MARKS[finding.state]:<6}  {finding.distribution}")
        if finding.state == "broken":
            say(f"{'':>14}  {finding.reason}")
    for finding in findings:
        if finding.state == "broken":
            say(f"to fix {finding.name}:\n  {finding.command}")
    optional = [finding for finding in findings if finding.state == "absent"]
    for finding in optional:
        say(f"to add {finding.name}:\n  {finding.command}")
    say("ready" if usable(findings) else "not ready: fix what is broken, top to bottom")
    return 0 if usable(findings) else 1


def _work_dir(options: argparse.Namespace, config: Any) -> Path:
    """From the command line, or the config, or named after it: the libraries' own order."""
    if options.work_dir is not None:
        return writable_folder(options.work_dir, "--work-dir")
    stem = Path(options.config).name.removesuffix(".py")
    return writable_folder(Path(config.get("work_dir") or Path("work_dirs") / stem), "work_dir")
