"""The options of the command ``hatnet-dense``. How it looks and ends is in :mod:`hatnet_core.commands`.

A module beside the package, which imports nothing of it before the arguments are read: ``import hatnet_dense``
registers classes with MMEngine and so imports torch, seconds that ``--help`` and a mistyped line need not wait.
What the commands do is in :mod:`hatnet_dense.cli`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hatnet_core.commands import STATUSES, TRACEBACK, Parser, add_device, add_format, add_size, real, some_path

Commands: TypeAlias = "argparse._SubParsersAction[Any]"

BAD_IMAGE = ("strict", "replace")
"""Names of ``--on-bad-image``, the default first; those of hatnet-train."""

LARGEST_SIDE = 4096
"""Of an image that FLOPs are counted on, in pixels: the model runs on it, in several GiB of memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    # importlib's, and torch's own compiler's; nothing a user of this command can change
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    warnings.filterwarnings("ignore", "nothing of hatnet_dense is registered")  # the error says it, in one line
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
    return parser().run(_main, arguments)


def parser() -> Parser:
    """The options of ``hatnet-dense``."""
    made = _Parser(
        "hatnet-dense",
        description="HAT-Net in MMDetection and MMSegmentation: train, test and predict with any of their configs, "
        "or with one that comes with this package.",
        epilog="examples:\n"
        "  hatnet-dense doctor\n"
        "  hatnet-dense train mask-rcnn_hatnet-s_fpn_1x_coco\n"
        "  torchrun --nproc-per-node 8 --no-python \\\n"
        "      hatnet-dense train mask-rcnn_hatnet-s_fpn_1x_coco --launcher pytorch\n"
        "  hatnet-dense predict mask-rcnn_hatnet-s_fpn_1x_coco \\\n"
        f"      epoch_12.pth photographs --out found\n\n{STATUSES}",
        version=importlib.metadata.version("hatnet-dense"),
    )
    commands = made.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_check, _add_train, _add_test, _add_predict, _add_flops, _add_configs, _add_doctor):
        add(commands)
    return made


def _command(commands: Commands, name: str, text: str, more: str = "", example: str = "") -> Parser:
    epilog = f"example:\n  {example}" if example else ""
    added: Parser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}", epilog=epilog
    )
    added.set_defaults(run=name)
    return added


def _add_train(commands: Commands) -> None:
    train = _command(
        commands,
        "train",
        "train the model of a config",
        "Checkpoints and logs go to --work-dir.",
        "hatnet-dense train retinanet_hatnet-t_fpn_1x_coco \\\n"
        "      --cfg-options train_cfg.max_epochs=1 train_dataloader.batch_size=4",
    )
    _add_config(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from CHECKPOINT, or without it from the last one in the work dir, if there is one",
    )
    train.add_argument(
        "--amp",
        nargs="?",
        const="float16",
        choices=("float16", "bfloat16"),
        help="automatic mixed precision on a GPU (float16 if none is named)",
    )
    train.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate linearly from the batch size that the config was made for",
    )
    train.add_argument(
        "--zero-stage",
        type=int,
        choices=(1, 2, 3),
        help="train with DeepSpeed: divide optimizer states (1), gradients (2), parameters (3) among the processes",
    )
    _add_run(train)


def _add_check(commands: Commands) -> None:
    check = _command(
        commands,
        "check",
        "check the data of a config without training",
        "Prints the images and objects of each class, what is skipped, and all problems: annotations that cannot be "
        "used, missing and unreadable files, pictures that training and validation share. Status 1 if there are any.",
        "hatnet-dense check retinanet_hatnet-t_fpn_1x_coco",
    )
    _add_config(check)


def _add_test(commands: Commands) -> None:
    test = _command(
        commands,
        "test",
        "evaluate a checkpoint with the evaluators of its config",
        "The metrics are printed as JSON.",
        "hatnet-dense test retinanet_hatnet-t_fpn_1x_coco \\\n      epoch_12.pth --out metrics.json",
    )
    _add_config(test)
    _add_checkpoint(test)
    test.add_argument("--out", type=some_path, metavar="FILE", help="write to this JSON file, too")
    test.add_argument("--show-dir", type=some_path, metavar="DIR", help="draw truth and prediction of every image")
    _add_run(test)


def _add_predict(commands: Commands) -> None:
    predict = _command(
        commands,
        "predict",
        "predict image files: pictures, and JSON or label images",
        example="hatnet-dense predict mask-rcnn_hatnet-s_fpn_1x_coco \\\n      epoch_12.pth photographs --out found",
    )
    _add_config(predict)
    _add_checkpoint(predict)
    predict.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="image file, or folder, searched recursively"
    )
    predict.add_argument(
        "--score-threshold", type=real(0, 1), default=0.3, metavar="SCORE", help="of the boxes drawn (default 0.3)"
    )
    predict.add_argument(
        "--on-bad-image",
        choices=BAD_IMAGE,
        default=BAD_IMAGE[0],
        help="an image that cannot be read is named and skipped; strict: the exit status is 1 after all others; "
        f"replace: that is only a warning (default {BAD_IMAGE[0]})",
    )
    add_device(predict)
    predict.add_argument("--out", type=some_path, required=True, metavar="DIR", help="write to this folder")


def _add_flops(commands: Commands) -> None:
    flops = _command(
        commands,
        "flops",
        "count parameters and FLOPs of the model of a config",
        "Table 4 of the paper has 800 1280, Table 3 512.",
        "hatnet-dense flops semfpn_hatnet-s_4xb4-80k_ade20k-512x512 --size 512",
    )
    _add_config(flops)
    add_size(flops, (800, 1280), LARGEST_SIDE)
    add_format(flops)


def _add_configs(commands: Commands) -> None:
    configs = _command(commands, "configs", "list the configs of this package, or print the paths of some")
    _completed(
        configs.add_argument("names", nargs="*", metavar="NAME", help="print its path, for the libraries' own tools")
    )


def _add_doctor(commands: Commands) -> None:
    doctor = _command(commands, "doctor", "report what is installed, whether it fits, and what fixes it")
    add_format(doctor)


class _Parser(Parser):
    def explain(self, error: Exception) -> str:
        """An error of ours or of the libraries, in one line."""
        if isinstance(error, FileNotFoundError) and error.filename:
            return f"no file at {error.filename}: expected what the config names, or --cfg-options to name another"
        from hatnet_dense.errors import EXPECTED, said

        if isinstance(error, ModuleNotFoundError):
            return f"{said(error)}; 'hatnet-dense doctor' says what fixes it"
        hint = "" if isinstance(error, EXPECTED) else f" ({TRACEBACK}=1 shows where it comes from)"
        return said(error) + hint


def _main(options: argparse.Namespace) -> int | None:
    from hatnet_dense import cli

    status: int | None = getattr(cli, options.run)(options)
    return status


def _add_config(parser: argparse.ArgumentParser) -> None:
    _completed(
        parser.add_argument(
            "config", metavar="CONFIG", help="config file, or a name that 'hatnet-dense configs' lists"
        )
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        type=_key_value,
        default=[],
        metavar="KEY=VALUE",
        help="over the values of the config, such as train_cfg.max_epochs=1 train_dataloader.dataset.data_root=/data/",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint that a training run wrote")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work-dir",
        type=some_path,
        metavar="DIR",
        help="folder of the run (default work_dirs/ and the config's name)",
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="none",
        help="what started the processes: pytorch is torchrun (default none: one process)",
    )


def _key_value(text: str) -> str:
    key, equals, _ = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return text


def _completed(action: argparse.Action) -> None:
    """Let a shell complete the names of this package's configs, beside files."""

    def names(prefix: str, **_: Any) -> list[str]:
        spec = importlib.util.find_spec("hatnet_dense")  # not imported: that takes seconds
        folders = (spec.submodule_search_locations if spec else None) or []
        ours = [path.stem for folder in folders for path in Path(folder, "configs").glob("*.py")]
        from argcomplete.completers import FilesCompleter

        return sorted(ours) + list(FilesCompleter(["py"])(prefix))

    action.completer = names  # type: ignore[attr-defined]  # argcomplete's
