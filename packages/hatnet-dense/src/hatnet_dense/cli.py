"""Commands of ``hatnet-dense``: options in, one call. :mod:`hatnet_core.console` parses, logs and ends them.

Each command imports the libraries that it needs, so that ``--help`` is fast and ``doctor`` runs where they are broken.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from hatnet_core.console import (
    PATH,
    USAGE,
    BadImages,
    Command,
    Device,
    Flag,
    Format,
    Images,
    SomePath,
    one_of,
    option,
    pixels,
    real,
    run,
    say,
    several,
    text,
    whole,
    writable_file,
    writable_folder,
)
from hatnet_dense.__about__ import __version__

LARGEST_SIDE = 4096
"""Largest side of an image to count FLOPs on, in pixels; the model runs on it and takes several GiB."""

SHOWN = 50
"""Largest number of problems that ``check`` prints."""

MARKS = {"ok": "ok", "absent": "-", "broken": "BROKEN"}
"""Words for the states of a finding."""


def _optional_word(default: str, metavar: str, known: Sequence[str] = ()) -> PrimitiveConstructorSpec[str]:
    """Type of an option that means ``default`` without a word after it."""

    def read(words: list[str]) -> str:
        if len(words) > 1:
            raise ValueError(f"expected at most one word, got {' '.join(words)!r}")
        word = words[0] if words else default
        return one_of(known)(word) if known else word

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{metavar}]",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )


def _key_value(word: str) -> str:
    key, equals, _ = word.partition("=")
    if not key or not equals:
        raise ValueError(f"expected KEY=VALUE, got {word!r}")
    return word


@dataclass(frozen=True, kw_only=True)
class OfConfig(Command):
    """A command that reads a config."""

    config: Positional[Annotated[str, text("CONFIG")]]
    """Config file, or a name that 'hatnet-dense configs' lists."""

    cfg_options: Annotated[
        tuple[str, ...], several(option(str, "KEY=VALUE", _key_value)), arg(help_behavior_hint="")
    ] = ()
    """Values that replace those of the config, such as train_cfg.max_epochs=1 train_dataloader.batch_size=4."""

    def load(self) -> Any:
        """Read the config."""
        from hatnet_dense.config import load_config

        return load_config(self.config, list(self.cfg_options))


@dataclass(frozen=True, kw_only=True)
class OfRun(OfConfig):
    """A command that runs MMEngine's runner, in one process or many."""

    work_dir: Annotated[Path | None, PATH, arg(metavar="DIR", help_behavior_hint="")] = None
    """Folder of the run; by default work_dirs/ and the name of the config."""

    launcher: Literal["none", "pytorch", "slurm", "mpi"] = "none"
    """Launcher of the processes: pytorch is torchrun; none is one process."""

    def folder(self, config: Any) -> Path:
        """Return the folder of the run: from the command line, the config, or named after it, in this order."""
        if self.work_dir is not None:
            return writable_folder(self.work_dir, "--work-dir")
        stem = Path(self.config).name.removesuffix(".py")
        return writable_folder(Path(config.get("work_dir") or Path("work_dirs") / stem), "work_dir")


@dataclass(frozen=True, kw_only=True)
class Train(OfRun):
    r"""Train the model of a config. Checkpoints and logs go to --work-dir.

    Examples:
      hatnet-dense train retinanet_hatnet-t_fpn_1x_coco \
          --cfg-options train_cfg.max_epochs=1
      torchrun --nproc-per-node 8 --no-python hatnet-dense train \
          mask-rcnn_hatnet-s_fpn_1x_coco --launcher pytorch
    """

    resume: Annotated[str | None, _optional_word("auto", "CHECKPOINT"), arg(help_behavior_hint="")] = None
    """Resume from CHECKPOINT, by default from the last one in the work dir, if there is one."""

    amp: Annotated[
        str | None,
        _optional_word("float16", "{float16,bfloat16}", ("float16", "bfloat16")),
        arg(help_behavior_hint=""),
    ] = None
    """Use automatic mixed precision on a GPU, float16 by default."""

    auto_scale_lr: Flag = False
    """Scale the learning rate linearly from the batch size that the config was made for."""

    zero_stage: Annotated[int | None, whole(1, 3, "{1,2,3}")] = None
    """Train with DeepSpeed, dividing optimizer states (1), gradients (2), parameters (3) among processes."""

    def run(self) -> None:
        """Train."""
        config = self.load()
        from hatnet_dense import runs  # after load, which reports missing libraries clearly

        last = runs.train(
            config,
            self.folder(config),
            self.resume,
            self.amp,
            self.auto_scale_lr,
            self.launcher,
            self.zero_stage,
        )
        if last is not None:
            say(f"trained: {last}")


@dataclass(frozen=True, kw_only=True)
class Test(OfRun):
    r"""Evaluate a checkpoint with the evaluators of its config. The metrics are printed as JSON.

    Examples:
      hatnet-dense test retinanet_hatnet-t_fpn_1x_coco \
          epoch_12.pth --out metrics.json
    """

    checkpoint: Positional[SomePath]
    """Checkpoint of a training run."""

    out: Annotated[Path | None, PATH, arg(metavar="FILE", help_behavior_hint="")] = None
    """Also write the metrics to this JSON file."""

    show_dir: Annotated[Path | None, PATH, arg(metavar="DIR", help_behavior_hint="")] = None
    """Draw truth and prediction of every image into this folder."""

    def run(self) -> None:
        """Evaluate."""
        out = None if self.out is None else writable_file(self.out)
        show_dir = None if self.show_dir is None else writable_folder(self.show_dir, "--show-dir")
        config = self.load()
        from hatnet_dense import runs

        metrics = runs.evaluate(config, self.checkpoint, self.folder(config), show_dir, self.launcher)
        if metrics is None:
            return
        if out is not None:
            runs.write_metrics(metrics, out)
        say(json.dumps(metrics, indent=2))


@dataclass(frozen=True, kw_only=True)
class Predict(BadImages, OfConfig):
    r"""Predict image files: drawn predictions, and JSON or label images.

    Examples:
      hatnet-dense predict mask-rcnn_hatnet-s_fpn_1x_coco \
          epoch_12.pth photographs --out found
    """

    checkpoint: Positional[SomePath]
    """Checkpoint of a training run."""

    images: Images

    out: Annotated[Path, PATH, arg(metavar="DIR")]
    """Folder to write."""

    score_threshold: Annotated[float, real(0, 1), arg(metavar="SCORE")] = 0.3
    """Lowest score of the boxes that are drawn."""

    device: Device = "auto"

    def run(self) -> int:
        """Predict."""
        out = writable_folder(self.out)
        config = self.load()
        from hatnet_dense.annotations import counted
        from hatnet_dense.predict import predict

        record = predict(config, self.checkpoint, list(self.images), out, self.score_threshold, self.device, self.skip)
        done = len(record["images"])
        if done:
            say(f"predictions of {counted(done, 'image', 'images')}: {out / 'predictions.json'}")
        return self.finish(done + len(self.problems))


@dataclass(frozen=True, kw_only=True)
class Check(OfConfig):
    """Check the data of a config without training.

    Prints the images and objects of each class, what is skipped, and all problems: annotations that cannot be used,
    missing and unreadable files, pictures that training and validation share. Exit status 1 if there are any.

    Examples:
      hatnet-dense check retinanet_hatnet-t_fpn_1x_coco
    """

    def run(self) -> int:
        """Check."""
        config = self.load()
        from hatnet_dense.annotations import counted
        from hatnet_dense.survey import survey_config

        surveys = survey_config(config)
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


@dataclass(frozen=True, kw_only=True)
class Flops(OfConfig):
    """Count parameters and FLOPs of the model of a config. Table 4 of the paper has 800 1280, Table 3 512.

    Examples:
      hatnet-dense flops semfpn_hatnet-s_4xb4-80k_ade20k-512x512 --size 512
    """

    size: Annotated[tuple[int, int], pixels(LARGEST_SIDE)] = (800, 1280)
    """Height and width of the image in pixels, 32 to 4096; one number is both."""

    format: Format = "table"

    def run(self) -> None:
        """Count."""
        config = self.load()
        from hatnet_dense.flops import count

        height, width = self.size
        row = {"config": self.config, "height": height, "width": width, **count(config, height, width)}
        if self.format == "json":
            say(json.dumps(row, indent=2))
            return
        say(f"{self.config} at {height}×{width}, one multiply-add is one FLOP")
        for prefix, name in (("", "whole model"), ("backbone_", "backbone")):
            say(
                f"{name:>12}: {row[prefix + 'params'] / 1e6:.2f} M parameters, "
                f"{row[prefix + 'flops_complete'] / 1e9:.1f} GFLOPs, "
                f"{row[prefix + 'flops_paper'] / 1e9:.1f} without the matrix products of the attention"
            )


@dataclass(frozen=True, kw_only=True)
class Configs(Command):
    """List the configs of this package, or print the paths of some, for the libraries' own tools."""

    names: Positional[tuple[Annotated[str, option(str, "NAME", str)], ...]] = ()
    """Configs whose paths to print."""

    def run(self) -> None:
        """List."""
        from hatnet_dense.config import config_names, config_path

        for name in self.names or config_names():
            say(str(config_path(name) if self.names else name))


@dataclass(frozen=True, kw_only=True)
class Doctor(Command):
    """Report what is installed, whether it fits, and what fixes it."""

    format: Format = "table"

    def run(self) -> int:
        """Report."""
        from hatnet_dense.compat import examine, usable

        findings = examine()
        if self.format == "json":
            say(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
            return 0 if usable(findings) else 1
        say(f"hatnet-dense {__version__}, Python {sys.version.split()[0]}")
        for finding in findings:
            say(f"{finding.name:>14}  {MARKS[finding.state]:<6}  {finding.distribution}")
            if finding.state == "broken":
                say(f"{'':>14}  {finding.reason}")
        for state, verb in (("broken", "fix"), ("absent", "add")):
            for finding in findings:
                if finding.state == state:
                    say(f"to {verb} {finding.name}:\n  {finding.command}")
        say("ready" if usable(findings) else "not ready: fix what is broken, top to bottom")
        return 0 if usable(findings) else 1


COMMANDS: dict[str, type[Command]] = {
    "check": Check,
    "train": Train,
    "test": Test,
    "predict": Predict,
    "flops": Flops,
    "configs": Configs,
    "doctor": Doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    # warnings of importlib and of torch's compiler, which users of this command cannot change
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator" not in record.getMessage()
    )  # to stdout
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words.count("--cfg-options") > 1:
        sys.stderr.write("hatnet-dense: error: --cfg-options must be given once, with all of its KEY=VALUE\n")
        return USAGE
    description = "HAT-Net in MMDetection and MMSegmentation, with any of their configs or one of this package."
    return run("hatnet-dense", COMMANDS, words, version=__version__, description=description, explain=explain)


def explain(error: Exception, options: Command) -> str:
    """Describe an error of this package or of the libraries in one line."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: the file does not exist; --cfg-options can name another than the config does"
    from hatnet_dense.errors import EXPECTED, said

    if isinstance(error, ModuleNotFoundError):
        return f"{said(error)}; 'hatnet-dense doctor' shows what fixes it"
    return said(error) + ("" if isinstance(error, EXPECTED) else " (--verbose shows the traceback)")
