"""The commands of hatnet-train: arguments in, one call, errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
import textwrap
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from hatnet_core import list_models
from hatnet_train.__about__ import __version__
from hatnet_train.config import TrainConfig
from hatnet_train.recipes import RECIPES, build_config
from hatnet_train.signals import REQUEUE, Preempted, Signals, stop_noticing

GRACE_SECONDS = 10.0

PREEMPT_SECONDS = 90.0

TIMEOUT_SECONDS = 600.0
"""How long a process waits for the others, if --timeout does not say."""


def train(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-train``; see its ``--help``."""
    parser = _Parser(
        "hatnet-train",
        "Train a HAT-Net with DeepSpeed: alone, or in every process that a launcher starts (deepspeed, torchrun, "
        "srun, mpirun).",
        "examples:\n"
        "  hatnet-train --recipe digits --out runs/digits\n"
        "  deepspeed --num_accelerators 2 --module hatnet_train --recipe digits --out runs/digits\n"
        "  deepspeed --hostfile hosts --module hatnet_train --recipe imagenet --data shards --out runs/small\n"
        "  hatnet-train --recipe digits --out runs/digits --resume auto\n"
        "  hatnet-train --verify runs/digits\n"
        f"exit status: 0; 1 after an error; {REQUEUE} if SIGTERM or SIGUSR1 ended the run, which can go on",
    )
    parser.add_argument("--recipe", metavar="NAME", help=f"values to start from; needed: {', '.join(RECIPES)}")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="run folder, needed to train: new, empty, or with --resume that run's own",
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
        type=float,
        default=PREEMPT_SECONDS,
        metavar="SECONDS",
        help=f"after SIGTERM or SIGUSR1, time to save before the process ends (default {PREEMPT_SECONDS:g})",
    )
    parser.add_argument(
        "--verify", type=Path, metavar="RUN", help="do nothing else: check every file of a run folder's checkpoints"
    )
    parser.add_argument("--preflight", action="store_true", help="do not train: check the processes and their network")
    parser.add_argument("--print-config", action="store_true", help="do not train: print the configuration as JSON")
    parser.add_argument(
        "--check-hostfile",
        type=Path,
        metavar="FILE",
        help="do nothing else: look up every host of DeepSpeed's hostfile",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=Path,
        metavar="FILE",
        help="DeepSpeed's own JSON; its values go before the recipe's and must not contradict the command line",
    )
    _add_timeout(parser)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # customary beside the JSON
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    _add_fields(parser)
    options = vars(parser.parse_args(arguments))
    given = {name: options[name] for name in options if name in TrainConfig.__dataclass_fields__}
    if options["check_hostfile"] is not None:
        return _report_errors("hatnet-train", lambda: _check_hostfile(options["check_hostfile"]))
    if options["verify"] is not None:
        return _report_errors("hatnet-train", lambda: _verify(options["verify"]))
    if not 0 < options["preempt_seconds"] < float("inf"):
        parser.error(f"--preempt-seconds must be positive, got {options['preempt_seconds']:g}")
    needed = ["recipe"] if options["preflight"] or options["print_config"] else ["recipe", "out"]
    if missing := [f"--{name}" for name in needed if options[name] is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return _report_errors("hatnet-train", lambda: _train(options, given))


def evaluate(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-eval``; see its ``--help``."""
    parser = _Parser(
        "hatnet-eval",
        "Top-1 and top-5 accuracy of a checkpoint on held-out images, each counted once, alone or in every process "
        "that a launcher starts.",
        "examples:\n"
        "  hatnet-eval --checkpoint runs/small/model.safetensors --data imagenet\n"
        "  hatnet-eval --checkpoint HAT-Net_Small.pth --variant hatnet_small --data shards --size 256",
    )
    _add_checkpoint(parser)
    parser.add_argument("--data", required=True, help=TrainConfig.__dataclass_fields__["data"].metadata["help"])
    parser.add_argument("--size", type=int, metavar="PIXELS", help="side of the input (default: as trained)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images a process (default 128)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="data workers a process (default 4)")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="fp32", help="default fp32")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="output (default table)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result to a JSON file, too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    _add_timeout(parser)
    options = parser.parse_args(arguments)

    def run() -> None:
        if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
            raise ValueError(f"--out must be a file in a folder that exists, got {options.out}")
        _import_deepspeed()
        from hatnet_train.evaluation import evaluation_run

        row = evaluation_run(
            options.checkpoint,
            options.data,
            variant=options.variant,
            size=options.size,
            batch_size=options.batch_size,
            workers=options.workers,
            precision=options.precision,
            timeout=options.timeout,
        )
        if row is None:  # rank 0 speaks
            return
        if options.format == "json":
            print(json.dumps(row, indent=2))
        else:
            print(
                f"{row['checkpoint']}: top-1 {row['top1']:.2f} %, top-5 {row['top5']:.2f} %, loss "
                f"{row['loss']:.4f} over {row['images']} images at {row['size']} pixels, "
                f"{row['images_per_second']:.0f} images/s"
            )
        if options.out is not None:
            options.out.write_text(json.dumps(row, indent=2) + "\n")

    return _report_errors("hatnet-eval", run)


def predict(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-predict``; see its ``--help``."""
    parser = _Parser(
        "hatnet-predict",
        "Classify image files with a checkpoint of hatnet-train.",
        "example:\n  hatnet-predict --checkpoint runs/digits/model.safetensors scan.png",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file, any format Pillow reads")
    _add_checkpoint(parser)
    parser.add_argument("--top-k", type=int, default=1, metavar="K", help="classes to show an image (default 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default auto)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="output (default table)")
    options = parser.parse_args(arguments)

    def run() -> None:
        from hatnet_train.classifier import load_classifier
        from hatnet_train.predict import predict as predict_images

        classifier = load_classifier(options.checkpoint, options.variant)
        rows = predict_images(classifier, options.images, options.top_k, options.device)
        if options.format == "json":
            print(json.dumps(rows, indent=2))
            return
        for row in rows:
            ranked = zip(row["classes"], row["probabilities"], strict=True)
            print(f"{row['image']}  " + "  ".join(f"{name} {100 * p:.1f} %" for name, p in ranked))

    return _report_errors("hatnet-predict", run)


def shards(arguments: Sequence[str] | None = None) -> int:
    """Command line of ``hatnet-shards``; see its ``--help``."""
    from hatnet_train.data.shard_writer import QUALITY, SHARD_MEGABYTES, write_shards
    from hatnet_train.data.shards import verify

    parser = _Parser(
        "hatnet-shards",
        "Write an ImageNet-layout folder as WebDataset tar shards with an index for random access, or check shards.",
        "examples:\n"
        "  hatnet-shards imagenet shards --workers 16\n"
        "  hatnet-shards imagenet shards-256 --resize 256 --workers 16\n"
        "  hatnet-shards --verify shards",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with train/ and val/; shards with --verify")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder for the shards, new or empty")
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="make the short side so small (default: as it is)"
    )
    parser.add_argument("--quality", type=int, default=QUALITY, help=f"of resized JPEG files (default {QUALITY})")
    parser.add_argument(
        "--shard-megabytes",
        type=float,
        default=SHARD_MEGABYTES,
        metavar="MB",
        help=f"about the size of a shard (default {SHARD_MEGABYTES:g})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of the training images (default 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: cores)")
    parser.add_argument("--verify", action="store_true", help="read all shards of DATA and compare their hashes")
    options = parser.parse_args(arguments)
    if options.verify == (options.out is not None):
        parser.error("--verify takes DATA alone" if options.verify else "the following arguments are required: OUT")

    def run() -> None:
        if options.verify:
            verify(options.data)
            print(f"{options.data}: all shards are as they were written")
            return
        index = write_shards(
            options.data,
            options.out,
            shard_megabytes=options.shard_megabytes,
            resize=options.resize,
            quality=options.quality,
            seed=options.seed,
            workers=options.workers,
        )
        for name, split in index["splits"].items():
            size = sum(shard["bytes"] for shard in split["shards"])
            print(f"{name}: {split['images']} images in {len(split['shards'])} shards, {size / 1e6:.1f} MB")

    return _report_errors("hatnet-shards", run)


def _check_hostfile(path: Path) -> None:
    from hatnet_train.preflight import check_hostfile

    hosts = check_hostfile(path)
    print(f"{path}: {len(hosts)} hosts, {sum(hosts.values())} processes, all names resolve")


def _verify(run: Path) -> None:
    from hatnet_train.verify import check_run, is_done

    found = check_run(run)
    for path, problems in found.items():
        sound = "usable" if path != run or is_done(run) else "not done, without final weights to check"
        print(f"{path}: {'damaged' if problems else sound}")
        for problem in problems:
            print(f"  {problem}")
    damaged = [str(path) for path, problems in found.items() if problems]
    usable = [path for path, problems in found.items() if not problems and path != run]
    if usable:
        print(f"--resume auto goes on from {usable[-1]}")
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(found)} are damaged: {', '.join(damaged)}")


def _train(options: dict[str, Any], given: dict[str, Any]) -> None:
    from hatnet_train.deepspeed_json import fields_of, read_deepspeed_json

    path = options["deepspeed_config"]
    user = read_deepspeed_json(path) if path is not None else {}
    fields = fields_of(user)
    for name in given.keys() & fields.keys():
        if given[name] != fields[name]:
            flag = "--" + name.replace("_", "-")
            if name == "lr_batch_size":
                raise ValueError(f"{flag} scales --lr, but {path} gives the learning rate: leave one out")
            raise ValueError(f"{flag} {given[name]} contradicts {path}, which gives {fields[name]}: leave one out")
    config = build_config(options["recipe"], {**fields, **given})
    if options["print_config"]:
        from hatnet_train.data.augment import TrainTransform

        TrainTransform(config)  # timm knows whether its policy is one
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return
    signals = Signals(options["preempt_seconds"])
    _import_deepspeed()
    from hatnet_train.run import train_run

    train_run(
        config,
        None if options["preflight"] else options["out"],
        user,
        resume=options["resume"],
        timeout=options["timeout"],
        signals=signals,
    )


def _import_deepspeed() -> None:
    """Import DeepSpeed with its log on standard error: ours is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        importlib.import_module("deepspeed")


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of :class:`TrainConfig`."""
    group = parser.add_argument_group("values over those of the recipe")
    kinds = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind: Any = kinds[field.name]
        extra: dict[str, Any] = {"type": kind, "metavar": getattr(kind, "__name__", "").upper()}
        if kind is bool:
            extra = {"action": argparse.BooleanOptionalAction}
        elif isinstance(kind, types.UnionType):  # three numbers or None
            extra = {"type": int, "nargs": len(get_args(get_args(kind)[0])), "metavar": "N", "action": _Tuple}
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"] + _values(field)
        group.add_argument(flag, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **extra)


def _values(field: dataclasses.Field[Any]) -> str:
    """What a field is by default and in the two recipes that the others change, in brackets."""
    values = {
        recipe: RECIPES[recipe][field.name] for recipe in ("digits", "imagenet") if field.name in RECIPES[recipe]
    }
    if field.default not in (dataclasses.MISSING, None, ""):
        values["default"] = field.default
    shown = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f" ({shown})" if shown else ""


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="PATH",
        help="run folder, one of its checkpoints, a .safetensors file of it, or with --variant any file of weights",
    )
    parser.add_argument(
        "--variant",
        choices=list_models(ablations=True),
        metavar="NAME",
        help="the model, where the checkpoint does not say: " + ", ".join(list_models()) + " or an ablation",
    )


def _add_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"how long to wait for a process that does not come or answer (default {TIMEOUT_SECONDS:g})",
    )


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


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=textwrap.fill(description, 100),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")

    def error(self, message: str) -> NoReturn:
        """Print the message alone, once a launch, and exit with 2."""
        _print_error(self.prog, f"{message} (see {self.prog} --help)")
        sys.exit(2)


def _report_errors(prog: str, run: Callable[[], None]) -> int:
    """Exit status of ``run``: 0, or 1 after one line on what went wrong."""
    try:
        run()
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        _print_error(prog, str(error))
        return 1
    except RuntimeError as error:
        known = _known_cause(str(error))
        if known is None:
            raise
        _print_error(prog, known)
        return 1
    except Preempted as end:
        if os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"{prog}: {end}\n")
        return REQUEUE
    except KeyboardInterrupt:
        _print_error(prog, "interrupted")
        return 130
    return 0


CAUSES = {
    r"Connection (closed by peer|reset)|Connection refused|NCCL|ProcessGroup|Timed out waiting|gloo": (
        "lost contact with another process, whose own output says why"
    ),
    r"DataLoader worker \(pid.*\) (is killed|exited unexpectedly)": (
        "a data worker was killed from outside, perhaps for its memory; fewer --workers need less"
    ),
    r"out of memory|can't allocate memory": (
        "not enough memory; --accumulation, --activation-checkpointing or a smaller --batch-size need less"
    ),
}
"""What errors of torch mean that are no fault of the program, by regular expression."""


def _known_cause(text: str) -> str | None:
    for pattern, meaning in CAUSES.items():
        if re.search(pattern, text):
            return f"{meaning} ({text.strip().partition(chr(10))[0]})"
    return None


def _print_error(prog: str, message: str) -> None:
    """Report an error that usually every process of a launch meets, in one line.

    The launcher ends all processes soon after the first: the others leave rank 0 time to report, and speak only where
    it did not end, because the error was theirs alone.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"{prog}: error: {message}", file=sys.stderr, flush=True)
    else:
        stop_noticing()  # the launcher's SIGTERM is meant
        time.sleep(GRACE_SECONDS)
        print(f"{prog}: error: [rank {rank}] {message}", file=sys.stderr, flush=True)
