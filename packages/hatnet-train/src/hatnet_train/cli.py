"""The commands of hatnet-train: options in, one call. :mod:`hatnet_core.console` parses, logs and ends them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
from tyro.conf import Positional, arg
from tyro.constructors import PrimitiveConstructorSpec

from hatnet_core import console
from hatnet_core.console import (
    PATH,
    USAGE,
    BadImages,
    Batch,
    Checkpoint,
    Command,
    Flag,
    Format,
    SomePath,
    UsageError,
    Variant,
    command_first,
    file_ending,
    one_of,
    option,
    real,
    say,
    text,
    whole,
    writable_file,
    writable_folder,
)
from hatnet_core.variants import MIN_SIZE
from hatnet_train.__about__ import __version__
from hatnet_train.config import (
    FIELDS,
    MAX_SIZE,
    MAX_WORKERS,
    QUALITY,
    SHARD_MEGABYTES,
    Options,
    TrainConfig,
    field_help,
)
from hatnet_train.errors import GRACE_SECONDS, explain
from hatnet_train.fields import FieldError
from hatnet_train.predict_cli import Predict
from hatnet_train.recipes import NEEDED, RECIPES, build_config, recipe_values
from hatnet_train.run.folder import values_of_run
from hatnet_train.signals import REQUEUE, Preempted, Signals
from hatnet_train.workers import kill

PREEMPT_SECONDS = 90.0
"""Time between SIGTERM and the end of the process to save in, by default."""

TIMEOUT_SECONDS = 600.0
"""Time that a process waits for the others, by default."""

SHOWN = "imagenet"
"""Recipe whose values ``--help`` shows without ``--recipe``."""

NUMBERS = tyro.constructors.ConstructorRegistry()
"""How numbers on the command line are read; the configuration knows their ranges."""


@NUMBERS.primitive_rule
def _number(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    if info.type is int:
        return whole()
    several = next((kind for kind in get_args(info.type) if get_origin(kind) is tuple), None)
    if several is not None:  # some integers, or None
        return PrimitiveConstructorSpec(
            nargs=len(get_args(several)),
            metavar=" ".join("N" for _ in get_args(several)),
            instance_from_str=lambda words: tuple(whole().instance_from_str([word]) for word in words),
            is_instance=lambda value: value is None or isinstance(value, tuple),
            str_from_instance=lambda value: ["None"] if value is None else list(map(str, value)),
        )
    return real() if info.type is float else None


RECIPE = option(str, "NAME", one_of(list(RECIPES)))

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Launched(Command):
    """A command that a launcher may start many times at once."""

    timeout: Annotated[float, real(0), arg(metavar="SECONDS")] = TIMEOUT_SECONDS
    """Seconds to wait for a process that does not start or answer."""

    local_rank: int = 0
    """Rank on this host, as the deepspeed launcher adds it; without effect."""


@dataclass(frozen=True, kw_only=True)
class Run(Options, Launched):
    """Options of a training run."""

    recipe: Annotated[str, RECIPE, arg(help=f"Values to start from: {', '.join(RECIPES)}.")]

    config: Annotated[Path | None, PATH, arg(metavar="FILE", help_behavior_hint="")] = None
    """Start from the values of another run in place of a recipe: its config.json or its folder."""

    resume: Annotated[str, text("auto|none|PATH")] = "none"
    """Resume from the newest checkpoint in --out, if there is one (auto), from that of another run folder, or from a
    checkpoint; none starts a new run. A run with more epochs or steps than before is extended, with the learning
    rate on the cosine of all of them."""

    preempt_seconds: Annotated[float, real(0), arg(metavar="SECONDS")] = PREEMPT_SECONDS
    """Seconds to save in after SIGTERM or SIGUSR1."""

    deepspeed_config: Annotated[Path | None, PATH, arg(metavar="FILE", help_behavior_hint="")] = None
    """DeepSpeed's own JSON. Its values replace those of the recipe and must not contradict the command line."""

    deepspeed: Flag = False
    """Customary with --deepspeed_config; without effect."""

    def start(self, out: Path | None) -> int:
        """Train, or without a folder check the processes only."""
        user = self.user_config()
        config = self.configuration(user)
        signals = Signals(self.preempt_seconds)
        _import_deepspeed()
        from hatnet_train.train import train_run

        try:
            with usage_errors():
                train_run(config, out, user, resume=self.resume, timeout=self.timeout, signals=signals)
        except Preempted as end:
            logger.info("%s", end)
            return REQUEUE
        return 0

    def user_config(self) -> dict[str, Any]:
        """Read the DeepSpeed JSON."""
        from hatnet_train.deepspeed.user_json import read_deepspeed_json

        return {} if self.deepspeed_config is None else read_deepspeed_json(self.deepspeed_config)

    def configuration(self, user: dict[str, Any]) -> TrainConfig:
        """Build the configuration from command line, DeepSpeed JSON and recipe or other run, in this order."""
        from hatnet_train.deepspeed.user_json import fields_of, key_of

        path, fields = self.deepspeed_config, fields_of(user)
        words = {word.partition("=")[0].replace("_", "-") for word in self.arguments}
        given = {name: value for name, value in self.to_dict().items() if {_flag(name), _flag(f"no_{name}")} & words}
        for name in given.keys() & fields.keys():
            if given[name] != fields[name]:
                gives = "the learning rate" if name == "lr_batch_size" else fields[name]
                raise UsageError(f"{_flag(name)} {given[name]} contradicts {path}, which gives {gives}: omit one")
        try:
            return self._configuration({**fields, **given})
        except FieldError as error:
            if error.field in fields and error.field not in given:
                raise ValueError(f"{path}: {key_of(error.field)} {error.problem}") from error
            raise UsageError(f"{_flag(error.field)} {error.problem}") from error

    def _configuration(self, given: dict[str, Any]) -> TrainConfig:
        if self.config is not None:
            if self.recipe:
                raise UsageError(f"--config cannot be combined with --recipe, got {self.recipe}")
            return TrainConfig.from_dict({**values_of_run(self.config), **given})
        if self.recipe == "finetune":
            from hatnet_train.finetune import finetune_config

            return finetune_config(given)
        return build_config(self.recipe, given)


@dataclass(frozen=True, kw_only=True)
class Train(Run):
    r"""Train a HAT-Net with DeepSpeed: alone, or in every process that a launcher starts.

    Launchers are deepspeed, torchrun, srun and mpirun. Weights, metrics, curves and checkpoints go to --out. The
    defaults below are those of --recipe imagenet, or of the recipe on the command line. Those of finetune follow the
    number of images; below they are for 1,000.

    Examples:
      hatnet-train --recipe finetune --data photos --out runs/photos
      hatnet-train --recipe digits --out runs/digits
      hatnet-train --recipe digits --out runs/digits --resume auto
      deepspeed --num_accelerators 2 --module hatnet_train \
          --recipe digits --out runs/digits
      deepspeed --hostfile hosts --module hatnet_train \
          --recipe imagenet --data shards --out runs/small

    Other commands, each with its --help:
      hatnet-train config          print the configuration as JSON
      hatnet-train preflight       check the processes and measure their network
      hatnet-train check-data      read all images and report every problem
      hatnet-train verify          check every file of a run folder
      hatnet-train check-hostfile  look up every host of DeepSpeed's hostfile
    """

    out: Annotated[Path, PATH, arg(metavar="DIR")]
    """Run folder: new, empty, or with --resume that of the run."""

    def run(self) -> int:
        """Train."""
        return self.start(writable_folder(self.out))


@dataclass(frozen=True, kw_only=True)
class Dry(Run):
    """A command that takes the command line of a run and writes nothing."""

    out: Annotated[Path | None, PATH, arg(metavar="DIR", help_behavior_hint="")] = None
    """Without effect, as are the options of checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Preflight(Dry):
    """Check the processes of a launch and measure their network, with the options of the run."""

    def run(self) -> int:
        """Check."""
        return self.start(None)


@dataclass(frozen=True, kw_only=True)
class Config(Dry):
    """Print the configuration of a run as JSON."""

    def run(self) -> None:
        """Print."""
        config = self.configuration(self.user_config())
        if config.augmentation.rand_augment:  # timm knows whether its policy is valid
            from hatnet_train.data.augment import TrainTransform

            with usage_errors():
                TrainTransform(config)
        say(json.dumps(config.to_dict(), indent=2))


@dataclass(frozen=True, kw_only=True)
class CheckData(Command):
    """Read all images of a data set, count those of each class, and print every problem.

    Problems are such as unreadable images, and pictures that are in both train/ and val/.
    """

    data: Annotated[str | None, text("DATA"), arg(help=field_help("data"))] = None

    recipe: Annotated[str | None, RECIPE] = None
    """Recipe whose data to check, if --data is not given."""

    labels: Annotated[str, text("FILE"), arg(help=field_help("labels"), help_behavior_hint="")] = ""

    held_out: Annotated[
        float | None,
        real(0, 1),
        arg(help=field_help("held_out"), help_behavior_hint="(default: that of --recipe, or 0)"),
    ] = None

    image_size: Annotated[int, whole(MIN_SIZE, MAX_SIZE, "PIXELS")] = MIN_SIZE
    """Side of synthetic images."""

    workers: Annotated[int, whole(0, MAX_WORKERS), arg(help=field_help("workers"))] = FIELDS["workers"].default

    def run(self) -> None:
        """Check."""
        recipe = RECIPES.get(self.recipe or "", {})
        data = self.data or recipe.get("data")
        if self.image_size != MIN_SIZE and data != "synthetic":
            raise UsageError(f"--image-size has an effect only with --data synthetic, got {self.image_size}")
        if not data:
            raise UsageError("--data is required")
        from hatnet_train.data import Split
        from hatnet_train.data.check import check_data

        held_out = recipe.get("held_out", 0.0) if self.held_out is None else self.held_out
        split = Split(labels=self.labels, held_out=held_out)
        found = check_data(data, size=self.image_size, workers=self.workers, split=split)
        width = max(map(len, ("class", *found.counts)))
        say(f"{'class':<{width}}  {'train':>9}  {'val':>9}")
        totals = (sum(n for n, _ in found.counts.values()), sum(n for _, n in found.counts.values()))
        for name, (training, held_out) in [*found.counts.items(), ("all", totals)]:
            say(f"{name:<{width}}  {training:>9,}  {held_out:>9,}")
        for line in filter(None, [str(found.skipped), *found.problems]):
            say(line)
        if found.problems:
            raise ValueError(f"{data}: {len(found.problems)} problem{'s' * (len(found.problems) > 1)}")
        say(f"{data}: no problems")


@dataclass(frozen=True, kw_only=True)
class Verify(Command):
    """Check every file of a run folder's checkpoints against its hash."""

    folder: Positional[SomePath]
    """Run folder."""

    def run(self) -> None:
        """Verify."""
        from hatnet_train.run.folder import check_run, is_done

        found = check_run(self.folder)
        for path, problems in found.items():
            sound = "usable" if path != self.folder or is_done(self.folder) else "not done, no final weights to check"
            say(f"{path}: {'damaged' if problems else sound}")
            for problem in problems:
                say(f"  {problem}")
        damaged = [str(path) for path, problems in found.items() if problems]
        usable = [path for path, problems in found.items() if not problems and path != self.folder]
        if usable:
            say(f"--resume auto resumes from {usable[-1]}")
        if damaged:
            raise ValueError(f"{len(damaged)} of {len(found)} are damaged: {', '.join(damaged)}")


@dataclass(frozen=True, kw_only=True)
class CheckHostfile(Command):
    """Look up every host of a hostfile of DeepSpeed."""

    file: Positional[SomePath]
    """Hostfile."""

    def run(self) -> None:
        """Look up."""
        from hatnet_train.distributed.preflight import check_hostfile

        hosts = check_hostfile(self.file)
        say(f"{self.file}: {len(hosts)} hosts, {sum(hosts.values())} processes, all names resolve")


COMMANDS: dict[str, type[Command]] = {
    "train": Train,
    "config": Config,
    "preflight": Preflight,
    "check-data": CheckData,
    "verify": Verify,
    "check-hostfile": CheckHostfile,
}

MODES = {
    "--print-config": "config",
    "--preflight": "preflight",
    "--check-data": "check-data",
    "--verify": "verify",
    "--check-hostfile": "check-hostfile",
}
"""Commands by the options that they once were."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(BadImages, Launched):
    r"""Measure top-1 and top-5 accuracy of a checkpoint on held-out images, each counted once.

    Runs alone, or in every process that a launcher starts. The result is printed.

    Examples:
      hatnet-eval --checkpoint runs/small --data imagenet --page imagenet.html
      hatnet-eval --checkpoint runs/small --data imagenet-a --classes present
      hatnet-eval --checkpoint HAT-Net_Small.pth --variant hatnet_small \
          --data shards --size 256 --out top1.json
    """

    checkpoint: Checkpoint

    variant: Variant = None

    data: Annotated[str, text("DATA"), arg(help=field_help("data"))]

    size: Annotated[
        int | None, whole(MIN_SIZE, MAX_SIZE, "PIXELS"), arg(help_behavior_hint="(default: as trained)")
    ] = None
    """Side of the square input in pixels, 32 to 2048."""

    batch: Batch = 128

    workers: Annotated[int, whole(0, MAX_WORKERS), arg(help=field_help("workers"))] = 4

    precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    """Precision to compute in."""

    format: Format = "table"

    out: Annotated[Path | None, PATH, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the result to this JSON file, too."""

    page: Annotated[Path | None, file_ending(".html"), arg(help_behavior_hint="")] = None
    """Write a page with accuracy per class, confusions and mistakes as pictures to this HTML file."""

    per_class: Annotated[Path | None, file_ending(".csv"), arg(help_behavior_hint="")] = None
    """Write the accuracy of every class to this CSV file."""

    classes: Literal["all", "present"] = "all"
    """Classes to choose among: all of the checkpoint, or those with images only, as for ImageNet-A and ImageNet-R."""

    def run(self) -> int:
        """Evaluate."""
        for name, path in (("--out", self.out), ("--page", self.page), ("--per-class", self.per_class)):
            if path is not None:
                writable_file(path, name)
        _import_deepspeed()
        from hatnet_core.io import atomic_write
        from hatnet_train.evaluate import evaluation_run

        row = evaluation_run(
            self.checkpoint,
            self.data,
            variant=self.variant,
            size=self.size,
            batch_size=self.batch,
            workers=self.workers,
            precision=self.precision,
            timeout=self.timeout,
            present=self.classes == "present",
            page=self.page,
            per_class=self.per_class,
            on_bad=self.skip,
        )
        if row is None:  # rank 0 reports
            return 0
        if self.out is not None:
            with atomic_write(self.out) as part:
                part.write_text(json.dumps(row, indent=2) + "\n")
        if self.format == "json":
            say(json.dumps(row, indent=2))
        else:
            not_counted = f" ({row['bad_images']} cannot be read)" if row["bad_images"] else ""
            say(
                f"{row['checkpoint']}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, loss {row['loss']:.4f} "
                f"over {row['images']} images{not_counted} at {row['size']} pixels, "
                f"{row['images_per_second']:.0f} images/s"
            )
        return self.finish(row["images"] + row["bad_images"], row["bad_images"])


@dataclass(frozen=True, kw_only=True)
class WriteShards(BadImages, Command):
    """Write an ImageNet-layout folder as WebDataset tar shards with an index for random access.

    The subcommand verify checks shards.

    Examples:
      hatnet-shards imagenet --out shards --workers 16
      hatnet-shards imagenet --out shards-256 --resize 256 --workers 16
      hatnet-shards verify shards
    """

    data: Positional[SomePath]
    """Folder with train/ and val/."""

    out: Annotated[Path, PATH, arg(metavar="DIR")]
    """Folder to write, new or empty."""

    resize: Annotated[
        int | None, whole(MIN_SIZE, metavar="PIXELS"), arg(help_behavior_hint="(default: unchanged)")
    ] = None
    """Reduce the short side of larger images to this size, from 32."""

    quality: Annotated[int | None, whole(1, 100), arg(help_behavior_hint=f"(default: {QUALITY})")] = None
    """Quality of the JPEG files that --resize makes, 1 to 100."""

    shard_megabytes: Annotated[float, real(0), arg(metavar="MB")] = SHARD_MEGABYTES
    """Approximate size of a shard."""

    seed: Annotated[int, whole(0)] = 0
    """Seed of the order of the training images."""

    workers: Annotated[int, whole(0, MAX_WORKERS), arg(help_behavior_hint="(default: as many as cores)")] = (
        os.cpu_count() or 1
    )
    """Processes that write."""

    def run(self) -> int:
        """Write."""
        if self.quality is not None and self.resize is None:
            raise UsageError(f"--quality has an effect only with --resize, got {self.quality}")
        from hatnet_train.data.shard_writer import write_shards

        index = write_shards(
            self.data,
            writable_folder(self.out),
            shard_megabytes=self.shard_megabytes,
            resize=self.resize,
            quality=self.quality or QUALITY,
            seed=self.seed,
            workers=self.workers,
            on_bad=self.skip,
        )
        for name, split in index["splits"].items():
            written = split["shards"]
            size = sum(shard["bytes"] for shard in written)
            number = "1 shard" if len(written) == 1 else f"{len(written)} shards"
            say(f"{name}: {split['images']} images in {number}, {size / 1e6:.1f} MB")
        return self.finish(sum(split["images"] for split in index["splits"].values()) + len(self.problems))


@dataclass(frozen=True, kw_only=True)
class VerifyShards(Command):
    """Read all shards of a folder and compare their hashes with those of its index."""

    folder: Positional[SomePath]
    """Folder of shards."""

    def run(self) -> None:
        """Verify."""
        from hatnet_train.data.shards import verify

        verify(self.folder)
        say(f"{self.folder}: all shards match their hashes")


SHARD_COMMANDS: dict[str, type[Command]] = {"write": WriteShards, "verify": VerifyShards}


def train(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-train``; see its ``--help``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--local_rank" in words[:-1]:  # in one word, as a value must not be taken for a command
        at = words.index("--local_rank")
        words[at : at + 2] = ["=".join(words[at : at + 2])]
    words.sort(key=lambda word: word.startswith("--local_rank="))  # the deepspeed launcher puts it first
    return _run("hatnet-train", COMMANDS, command_first("hatnet-train", words, MODES), "train")


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-eval``; see its ``--help``."""
    return _run("hatnet-eval", Evaluate, arguments)


def predict(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-predict``; see its ``--help``."""
    return _run("hatnet-predict", Predict, arguments)


def shards(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-shards``; see its ``--help``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = command_first("hatnet-shards", words, {"--verify": "verify"})
    return _run("hatnet-shards", SHARD_COMMANDS, words, "write")


def _run(prog: str, commands: Any, arguments: Sequence[str] | None, main: str | None = None) -> int:
    status: Any
    try:
        status = console.run(
            prog,
            commands,
            arguments,
            version=__version__,
            main=main,
            default=_defaults,
            explain=explain,
            registry=NUMBERS,
        )
    except SystemExit as end:
        status = end.code or 0
    finally:
        kill()  # whatever the command ended with, it leaves no worker
    if status == USAGE and console.rank():
        time.sleep(GRACE_SECONDS)  # the launcher ends all processes: rank 0 reports this first
    return int(status)


def _defaults(command: type[Command], words: list[str]) -> Any:
    """Return the command with the values of the recipe that the words name."""
    if not issubclass(command, Run):
        return None
    recipe, config = _value_of("--recipe", words), _value_of("--config", words)
    shown = recipe if recipe in RECIPES else SHOWN
    groups = vars(Options.from_dict({"data": "data", **recipe_values(shown)}))
    missing: dict[str, Any] = {"recipe": "" if config else tyro.MISSING}
    if command is Train:
        missing["out"] = tyro.MISSING if recipe in ("", shown) else Path("out")
    if recipe in ("", shown) and not config:  # else the recipe is what is wrong, or the other run has the value
        for name in NEEDED.get(shown, ("data",)):
            if name not in RECIPES[shown]:
                group = FIELDS[name].group
                groups[group] = dataclasses.replace(groups[group], **{name: tyro.MISSING})
    return command(**groups, **missing)


def _value_of(option: str, words: list[str]) -> str:
    """Value of an option in the words of a command line; empty without one."""
    follow = dict(itertools.pairwise(words))
    parts = [word.partition("=") for word in words]
    return next((value or follow.get(name, "") for name, _, value in parts if name == option), "")


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn an error about a field of the configuration into one about its option."""
    try:
        yield
    except FieldError as error:
        raise UsageError(f"{_flag(error.field)} {error.problem}") from error


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _import_deepspeed() -> None:
    """Import DeepSpeed with its log on standard error, without the line about having no GPU."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("deepspeed")
