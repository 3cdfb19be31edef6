"""The command ``hatnet-dense``: arguments in, one call, errors in one line.

A module beside the package, which imports nothing of it before the arguments are read: ``import hatnet_dense``
registers classes with MMEngine and so imports torch, seconds that ``--help`` and a mistyped line need not wait.
What the commands do is in :mod:`hatnet_dense.cli`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

TRACEBACK = "HATNET_TRACEBACK"
"""Environment variable; if it is set, an error shows where it comes from."""

LARGEST_SIDE = 4096
"""Of an image that FLOPs are counted on, in pixels: the model runs on it, in several GiB of memory."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 and the number of the signal."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    # importlib's, and torch's own compiler's; nothing a user of this command can change
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
    options = _parser().parse_args(arguments)
    try:
        from hatnet_dense import cli

        return int(getattr(cli, options.run)(options) or 0)
    except KeyboardInterrupt:
        sys.stderr.write("hatnet-dense: interrupted\n")
        return INTERRUPTED
    except Exception as error:  # the libraries raise whatever they like
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        sys.stderr.write(f"hatnet-dense: error: {_reason(error)}\n")
        return 1


def _reason(error: Exception) -> str:
    from hatnet_dense.errors import said

    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no file at {error.filename}: expected what the config names, or --cfg-options to name another"
    return said(error)


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hatnet-dense",
        description="HAT-Net in MMDetection and MMSegmentation: train, test and predict with any of their configs,\n"
        "or with one that comes with this package.",
        epilog="examples:\n"
        "  hatnet-dense train mask-rcnn_hatnet-s_fpn_1x_coco\n"
        "  torchrun --nproc-per-node 8 --no-python hatnet-dense train mask-rcnn_hatnet-s_fpn_1x_coco "
        "--launcher pytorch\n"
        "  hatnet-dense test mask-rcnn_hatnet-s_fpn_1x_coco work_dirs/mask-rcnn_hatnet-s_fpn_1x_coco/epoch_12.pth\n"
        "  hatnet-dense predict mask-rcnn_hatnet-s_fpn_1x_coco epoch_12.pth photographs --out found\n"
        "  hatnet-dense doctor\n"
        "exit status: 0; 1 after an error; 2 for a wrong command line; 130 if interrupted\n"
        f"{TRACEBACK}=1 in the environment shows where an error comes from",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {importlib.metadata.version('hatnet-dense')}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        added.set_defaults(run=name)
        return added

    train = command("train", "train the model of a config")
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

    test = command("test", "evaluate a checkpoint with the evaluators of its config")
    _add_config(test)
    _add_checkpoint(test)
    test.add_argument("--out", metavar="FILE", help="write the metrics to a JSON file, too")
    test.add_argument("--show-dir", metavar="DIR", help="draw truth and prediction of every image")
    _add_run(test)

    predict = command("predict", "predict image files: pictures, and JSON or label images")
    _add_config(predict)
    _add_checkpoint(predict)
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image file, or folder of images")
    predict.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    predict.add_argument(
        "--score-threshold", type=float, default=0.3, metavar="SCORE", help="of the boxes drawn (default 0.3)"
    )
    predict.add_argument("--device", default="auto", help="auto, cpu, cuda:0, ... (default auto)")

    flops = command("flops", "count parameters and FLOPs of the model of a config")
    _add_config(flops)
    flops.add_argument(
        "--size",
        nargs=2,
        type=_side,
        default=(800, 1280),
        metavar=("H", "W"),
        help="height and width of the image in pixels (default 800 1280, as in Table 4; Table 3 has 512 512)",
    )
    flops.add_argument("--format", choices=("table", "json"), default="table", help="output (default table)")

    configs = command("configs", "list the configs of this package, or print the paths of some")
    configs.add_argument("names", nargs="*", metavar="NAME", help="print its path, for the libraries' own tools")

    doctor = command("doctor", "say what is installed, whether it fits, and what mends it")
    doctor.add_argument("--format", choices=("table", "json"), default="table", help="output (default table)")
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="config file, or a name that 'hatnet-dense configs' lists")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="over the values of the config, such as train_cfg.max_epochs=1 train_dataloader.dataset.data_root=/data/",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint that a training run wrote")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work-dir", metavar="DIR", help="folder of the run (default work_dirs/ and the config's name)"
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="none",
        help="what started the processes: pytorch is torchrun (default none: one process)",
    )


def _side(text: str) -> int:
    if not text.isdecimal() or not 32 <= int(text) <= LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of pixels from 32 to {LARGEST_SIDE}")
    return int(text)
