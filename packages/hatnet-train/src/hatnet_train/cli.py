"""The commands of hatnet-train: arguments in, one call. How they look and end is in :mod:`hatnet_core.commands`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import os
import sys
import types
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hatnet_core.commands import (
    FAILED,
    SHARED,
    STATUSES,
    UsageError,
    add_batch,
    add_checkpoint,
    add_device,
    add_format,
    add_variant,
    real,
    say,
    some_path,
    whole,
    writable_file,
    writable_folder,
)
from hatnet_core.variants import MIN_SIZE
from hatnet_train.__about__ import __version__
from hatnet_train.config import BAD_IMAGE, MAX_SIZE, MAX_WORKERS, PRECISIONS, QUALITY, SHARD_MEGABYTES, TrainConfig
from hatnet_train.parser import LaunchedParser
from hatnet_train.recipes import RECIPES, build_config
from hatnet_train.signals import REQUEUE, Preempted, Signals

PREEMPT_SECONDS = 90.0
"""Between SIGTERM and the end of the process, to save in, if --preempt-seconds does not say."""

TIMEOUT_SECONDS = 600.0
"""How long a process waits for the others, if --timeout does not say."""


def train(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-train``; see its ``--help``."""
    return train_parser().run(_train, arguments)


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-eval``; see its ``--help``."""
    return evaluate_parser().run(_evaluate, arguments)


def predict(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-predict``; see its ``--help``."""
    return predict_parser().run(_predict, arguments)


def shards(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-shards``; see its ``--help``."""
    return shards_parser().run(_shards, arguments)


def train_parser() -> LaunchedParser:
    """The options of ``hatnet-train``."""
    parser = LaunchedParser(
        "hatnet-train",
        usage="%(prog)s --recipe NAME --out DIR [options]",
        description="Train a HAT-Net with DeepSpeed: alone, or in every process that a launcher starts (deepspeed, "
        "torchrun, srun, mpirun). Weights, metrics, curves and checkpoints go to --out.",
        epilog="examples:\n"
        "  hatnet-train --recipe digits --out runs/digits\n"
        "  hatnet-train --recipe digits --out runs/digits --resume auto\n"
        "  hatnet-train --verify runs/digits\n"
        "  hatnet-train --check-data --data flowers\n"
        "  deepspeed --num_accelerators 2 --module hatnet_train \\\n"
        "      --recipe digits --out runs/digits\n"
        "  deepspeed --hostfile hosts --module hatnet_train \\\n"
        f"      --recipe imagenet --data shards --out runs/small\n\n{STATUSES};\n"
        f"{REQUEUE} if SIGTERM or SIGUSR1 ended the run, which can go on",
        version=__version__,
    )
    parser.add_argument(
        "--recipe", choices=RECIPES, metavar="NAME", help=f"values to start from: {', '.join(RECIPES)}"
    )
    parser.add_argument(
        "--out",
        type=some_path,
        metavar="DIR",
        help="write to this run folder: new, empty, or with --resume that run's own",
    )
    parser.add_argument(
        "--resume",
        default="none",
        metavar="auto|none|PATH",
        help="go on from the newest checkpoint in --out, if there is one; or from that of another run folder, or a "
        "checkpoint itself (default none: a new run)",
    )
    parser.add_argument(
        "--preempt-seconds",
        type=real(0),
        default=PREEMPT_SECONDS,
        metavar="SECONDS",
        help=f"after SIGTERM or SIGUSR1, time to save before the process ends (default {PREEMPT_SECONDS:g})",
    )
    _add_timeout(parser)
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="FILE",
        help="DeepSpeed's own JSON; its values go before the recipe's and must not contradict the command line",
    )
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # customary beside the JSON
    _add_local_rank(parser)
    instead = parser.add_argument_group("instead of training").add_mutually_exclusive_group()
    instead.add_argument("--print-config", action="store_true", help="print the configuration as JSON")
    instead.add_argument("--preflight", action="store_true", help="check the processes and measure their network")
    instead.add_argument(
        "--check-data",
        action="store_true",
        help="read all images of --data, count those of each class, and print every problem, such as unreadable "
        "images and pictures that are in both train/ and val/",
    )
    instead.add_argument("--verify", type=Path, metavar="DIR", help="check every file of a run folder's checkpoints")
    instead.add_argument(
        "--check-hostfile", type=Path, metavar="FILE", help="look up every host of DeepSpeed's hostfile"
    )
    _add_fields(parser)
    return parser


def evaluate_parser() -> LaunchedParser:
    """The options of ``hatnet-eval``."""
    parser = LaunchedParser(
        "hatnet-eval",
        description="Top-1 and top-5 accuracy of a checkpoint on held-out images, each counted once: alone, or in "
        "every process that a launcher starts. The result is printed.",
        epilog="examples:\n"
        "  hatnet-eval --checkpoint runs/small --data imagenet\n"
        "  hatnet-eval --checkpoint HAT-Net_Small.pth --variant hatnet_small \\\n"
        f"      --data shards --size 256 --out top1.json\n\n{STATUSES}",
        version=__version__,
    )
    add_checkpoint(parser, required=True)
    add_variant(parser, ", where the checkpoint does not say it")
    parser.add_argument(
        "--data", required=True, metavar="DATA", help=TrainConfig.__dataclass_fields__["data"].metadata["help"]
    )
    parser.add_argument(
        "--size",
        type=whole(MIN_SIZE, MAX_SIZE, " of pixels"),
        metavar="PIXELS",
        help=f"{SHARED['--size']} to {MAX_SIZE} (default: as trained)",
    )
    add_batch(parser, 128)
    parser.add_argument(
        "--workers", type=whole(0, MAX_WORKERS), default=4, metavar="N", help="data workers a process (default 4)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="computed in (default fp32)")
    _add_on_bad_image(parser, "is not counted")
    _add_timeout(parser)
    _add_local_rank(parser)
    add_format(parser)
    parser.add_argument("--out", type=some_path, metavar="FILE", help="write to this JSON file, too")
    return parser


def predict_parser() -> LaunchedParser:
    """The options of ``hatnet-predict``."""
    parser = LaunchedParser(
        "hatnet-predict",
        description="Classify image files with a checkpoint. The result is printed, a line an image.",
        epilog="examples:\n"
        "  hatnet-predict scan.png --checkpoint runs/digits --top-k 3\n"
        f"  hatnet-predict scans/val --checkpoint runs/digits\n\n{STATUSES}",
        version=__version__,
    )
    parser.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image file, any format Pillow reads, or folder"
    )
    add_checkpoint(parser, required=True)
    add_variant(parser, ", where the checkpoint does not say it")
    parser.add_argument(
        "--top-k", type=whole(1), default=1, metavar="K", help="classes to show of each image (default 1)"
    )
    _add_on_bad_image(parser, "is skipped")
    add_device(parser)
    add_format(parser)
    return parser


def shards_parser() -> LaunchedParser:
    """The options of ``hatnet-shards``."""
    parser = LaunchedParser(
        "hatnet-shards",
        description="Write an ImageNet-layout folder as WebDataset tar shards with an index for random access, or "
        "check shards.",
        epilog="examples:\n"
        "  hatnet-shards imagenet --out shards --workers 16\n"
        "  hatnet-shards imagenet --out shards-256 --resize 256 --workers 16\n"
        f"  hatnet-shards shards --verify\n\n{STATUSES}",
        version=__version__,
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train/ and val/; shards with --verify")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=some_path, metavar="DIR", help="write to this folder: new or empty")
    what.add_argument("--verify", action="store_true", help="read all shards of DATA and compare their hashes")
    parser.add_argument(
        "--resize",
        type=whole(MIN_SIZE, unit=" of pixels"),
        metavar="PIXELS",
        help=f"make the short side of larger images so small, from {MIN_SIZE} up (default: unchanged)",
    )
    parser.add_argument(
        "--quality",
        type=whole(1, 100),
        metavar="N",
        help=f"of the JPEG files that --resize makes, 1 to 100 (default {QUALITY})",
    )
    parser.add_argument(
        "--shard-megabytes",
        type=real(0),
        default=SHARD_MEGABYTES,
        metavar="MB",
        help=f"about the size of a shard (default {SHARD_MEGABYTES:g})",
    )
    parser.add_argument(
        "--seed", type=whole(0), default=0, metavar="N", help="of the order of the training images (default 0)"
    )
    parser.add_argument(
        "--workers",
        type=whole(0, MAX_WORKERS),
        default=os.cpu_count(),
        metavar="N",
        help="processes that write (default: as many as cores)",
    )
    _add_on_bad_image(parser, "is skipped")
    return parser


def _train(options: Namespace) -> int:
    if options.check_hostfile is not None:
        return _check_hostfile(options.check_hostfile)
    if options.verify is not None:
        return _verify(options.verify)
    if options.check_data:
        return _check_data(options)
    needed = ["recipe"] if options.preflight or options.print_config else ["recipe", "out"]
    if missing := [f"--{name}" for name in needed if getattr(options, name) is None]:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}")
    user = _user_config(options.deepspeed_config)
    config = _config(options, user)
    if options.print_config:
        from hatnet_train.data.augment import TrainTransform

        TrainTransform(config)  # timm knows whether its policy is one
        say(json.dumps(dataclasses.asdict(config), indent=2))
        return 0
    out = None if options.preflight else writable_folder(options.out)
    signals = Signals(options.preempt_seconds)
    _import_deepspeed()
    from hatnet_train.run import train_run

    try:
        train_run(config, out, user, resume=options.resume, timeout=options.timeout, signals=signals)
    except Preempted as end:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"hatnet-train: {end}\n")
        return REQUEUE
    return 0


def _evaluate(options: Namespace) -> int:
    if options.out is not None:
        writable_file(options.out)
    _import_deepspeed()
    from hatnet_train.checkpoint import write_file
    from hatnet_train.evaluation import evaluation_run

    bad = _BadImages(options)
    row = evaluation_run(
        options.checkpoint,
        options.data,
        variant=options.variant,
        size=options.size,
        batch_size=options.batch,
        workers=options.workers,
        precision=options.precision,
        timeout=options.timeout,
        on_bad=bad,
    )
    if row is None:  # rank 0 speaks
        return 0
    status = bad.status(row["bad_images"])
    if options.out is not None:
        write_file(options.out, (json.dumps(row, indent=2) + "\n").encode())
    if options.format == "json":
        say(json.dumps(row, indent=2))
        return status
    not_counted = f" ({row['bad_images']} cannot be read)" if row["bad_images"] else ""
    say(
        f"{row['checkpoint']}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, loss {row['loss']:.4f} over "
        f"{row['images']} images{not_counted} at {row['size']} pixels, {row['images_per_second']:.0f} images/s"
    )
    return status


def _predict(options: Namespace) -> int:
    from hatnet_train.classifier import load_classifier
    from hatnet_train.predict import find_images, predictions

    bad = _BadImages(options)
    classifier = load_classifier(options.checkpoint, options.variant)
    files, skipped = find_images(options.images, bad)
    if text := str(skipped):
        sys.stderr.write(f"{options.parser.prog}: {text}\n")
    rows = []
    try:
        for row in predictions(classifier, files, options.top_k, options.device, bad):
            rows.append(row)
            if options.format == "table":
                ranked = zip(row["classes"], row["probabilities"], strict=True)
                say(f"{row['image']}  " + "  ".join(f"{name} {100 * p:.1f} %" for name, p in ranked))
    finally:
        if rows and options.format == "json":  # of the images so far, whatever stopped the rest
            say(json.dumps(rows, indent=2))
    return bad.status() if rows else FAILED


def _shards(options: Namespace) -> int:
    if options.quality is not None and options.resize is None:
        raise UsageError(f"--quality has an effect only with --resize, got {options.quality}")
    if options.verify and options.resize is not None:
        raise UsageError(f"--resize has an effect only with --out, got {options.resize}")
    if options.verify:
        from hatnet_train.data.shards import verify

        verify(options.data)
        say(f"{options.data}: all shards are as they were written")
        return 0
    from hatnet_train.data.shard_writer import write_shards

    bad = _BadImages(options)
    index = write_shards(
        options.data,
        writable_folder(options.out),
        shard_megabytes=options.shard_megabytes,
        resize=options.resize,
        quality=options.quality or QUALITY,
        seed=options.seed,
        workers=options.workers,
        on_bad=bad,
    )
    for name, split in index["splits"].items():
        written = split["shards"]
        size = sum(shard["bytes"] for shard in written)
        number = "1 shard" if len(written) == 1 else f"{len(written)} shards"
        say(f"{name}: {split['images']} images in {number}, {size / 1e6:.1f} MB")
    return bad.status()


class _BadImages:
    """Names images that cannot be read as they are met; ``--on-bad-image`` says whether they fail the command."""

    def __init__(self, options: Namespace) -> None:
        self.prog, self.strict = options.parser.prog, options.on_bad_image == "strict"
        self.count = 0

    def __call__(self, problem: str) -> None:
        self.count += 1
        sys.stderr.write(f"{self.prog}: {'error' if self.strict else 'warning: skipped'}: {problem}\n")

    def status(self, count: int | None = None) -> int:
        """Exit status after all images, of which ``count`` cannot be read: by default those of this process."""
        return FAILED if self.strict and (self.count if count is None else count) else 0


def _check_hostfile(path: Path) -> int:
    from hatnet_train.preflight import check_hostfile

    hosts = check_hostfile(path)
    say(f"{path}: {len(hosts)} hosts, {sum(hosts.values())} processes, all names resolve")
    return 0


def _check_data(options: Namespace) -> int:
    given = {**RECIPES.get(options.recipe, {}), **vars(options)}
    if not given.get("data"):
        raise UsageError("the following arguments are required: --data")
    from hatnet_train.data.check import check_data

    found = check_data(
        given["data"],
        size=given.get("image_size", MIN_SIZE),
        workers=given.get("workers", TrainConfig.__dataclass_fields__["workers"].default),
    )
    width = max(map(len, ("class", *found.counts)))
    say(f"{'class':<{width}}  {'train':>9}  {'val':>9}")
    totals = (sum(n for n, _ in found.counts.values()), sum(n for _, n in found.counts.values()))
    for name, (training, held_out) in [*found.counts.items(), ("all", totals)]:
        say(f"{name:<{width}}  {training:>9,}  {held_out:>9,}")
    for line in filter(None, [str(found.skipped), *found.problems]):
        say(line)
    if found.problems:
        raise ValueError(f"{given['data']}: {len(found.problems)} problem{'s' * (len(found.problems) > 1)}")
    say(f"{given['data']}: no problems")
    return 0


def _verify(run: Path) -> int:
    from hatnet_train.verify import check_run, is_done

    found = check_run(run)
    for path, problems in found.items():
        sound = "usable" if path != run or is_done(run) else "not done, without final weights to check"
        say(f"{path}: {'damaged' if problems else sound}")
        for problem in problems:
            say(f"  {problem}")
    damaged = [str(path) for path, problems in found.items() if problems]
    usable = [path for path, problems in found.items() if not problems and path != run]
    if usable:
        say(f"--resume auto goes on from {usable[-1]}")
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(found)} are damaged: {', '.join(damaged)}")
    return 0


def _user_config(path: Path | None) -> dict[str, Any]:
    """What a user's DeepSpeed JSON holds; nothing without one."""
    from hatnet_train.deepspeed_json import read_deepspeed_json

    return {} if path is None else read_deepspeed_json(path)


def _config(options: Namespace, user: dict[str, Any]) -> TrainConfig:
    """The run that was asked for: by the command line, the DeepSpeed JSON, the recipe, in this order."""
    from hatnet_train.deepspeed_json import fields_of, key_of

    path, fields = options.deepspeed_config, fields_of(user)
    given = {name: value for name, value in vars(options).items() if name in TrainConfig.__dataclass_fields__}
    for name in given.keys() & fields.keys():
        if given[name] != fields[name]:
            if name == "lr_batch_size":
                raise UsageError(f"{_flag(name)} scales --lr, but {path} gives the learning rate: leave one out")
            raise UsageError(
                f"{_flag(name)} {given[name]} contradicts {path}, which gives {fields[name]}: leave one out"
            )
    try:
        return build_config(options.recipe, {**fields, **given})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name in fields and name not in given:
            raise ValueError(f"{path}: {key_of(name)} {rest}") from error
        raise UsageError(f"{_flag(name)} {rest}" if name in TrainConfig.__dataclass_fields__ else error) from error


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _import_deepspeed() -> None:
    """Import DeepSpeed with its log on standard error, ours being for results, and not a line about having no GPU."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("deepspeed")


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of :class:`TrainConfig`."""
    group = parser.add_argument_group("values over those of the recipe")
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind: Any = kinds[field.name]
        extra: dict[str, Any] = {"type": READERS.get(kind, kind), "metavar": METAVARS.get(kind, "TEXT")}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, types.UnionType):  # three numbers or None
            number = len(get_args(get_args(kind)[0]))
            extra = {"type": READERS[int], "nargs": number, "metavar": "N", "action": _Tuple}
        if field.metadata["choices"] is not None:
            extra |= {"choices": field.metadata["choices"], "metavar": "N" if kind is int else "NAME"}
        text = field.metadata["help"] + _values(field)
        group.add_argument(_flag(field.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **extra)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


READERS = {int: _integer, float: _number}
"""How a field is read that is not text; :class:`TrainConfig` knows its range."""

METAVARS = {int: "N", float: "X"}


def _values(field: dataclasses.Field[Any]) -> str:
    """What a field is by default and in the two recipes that the others change, in brackets."""
    values = {
        recipe: RECIPES[recipe][field.name] for recipe in ("digits", "imagenet") if field.name in RECIPES[recipe]
    }
    if field.default not in (dataclasses.MISSING, None, ""):
        values["default"] = field.default
    shown = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f" ({shown})" if shown else ""


def _add_on_bad_image(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--on-bad-image",
        choices=BAD_IMAGE,
        default=BAD_IMAGE[0],
        help=f"an image that cannot be read is named and {what}; strict: the exit status is 1 after all others; "
        f"replace: that is only a warning (default {BAD_IMAGE[0]})",
    )


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=real(0),
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"how long to wait for a process that does not come or answer (default {TIMEOUT_SECONDS:g})",
    )


def _add_local_rank(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher


class _Tuple(argparse.Action):
    """Stores several numbers as a tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Called by argparse for the flag."""
        setattr(namespace, self.dest, tuple(values))
