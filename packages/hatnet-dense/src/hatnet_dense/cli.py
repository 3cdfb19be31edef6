"""The command ``hatnet-dense``: arguments in, one call, errors in one line.

The libraries are imported by the commands that need them: they take seconds, and ``doctor`` is for where they fail.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hatnet_dense.__about__ import __version__
from hatnet_dense.compat import examine, usable

MARKS = {"ok": "ok", "absent": "-", "broken": "BROKEN"}
"""How the states of a finding are shown."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see its ``--help``."""
    # importlib's, and torch's own compiler's; nothing a user of this command can change
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        return 0
    except (ImportError, ValueError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, FileNotFoundError) and error.filename:
            reason = f"no file at {error.filename}: expected what the config names, or --cfg-options to name another"
        print(f"hatnet-dense: error: {reason}", file=sys.stderr)
        return 1


def _train(options: argparse.Namespace) -> None:
    from hatnet_dense.config import load_config
    from hatnet_dense.runs import train

    config = load_config(options.config, options.cfg_options)
    work_dir = _work_dir(options, config)
    last = train(
        config, work_dir, options.resume, options.amp, options.auto_scale_lr, options.launcher, options.zero_stage
    )
    if last is not None:
        print(f"trained: {last}")


def _test(options: argparse.Namespace) -> None:
    from hatnet_dense.config import load_config
    from hatnet_dense.runs import evaluate, write_metrics

    if options.out is not None and not options.out.parent.is_dir():
        raise ValueError(f"--out must be a file in a folder that exists, got {options.out}")
    config = load_config(options.config, options.cfg_options)
    metrics = evaluate(config, options.checkpoint, _work_dir(options, config), options.show_dir, options.launcher)
    if metrics is None:
        return
    if options.out is not None:
        write_metrics(metrics, options.out)
    print(json.dumps(metrics, indent=2))


def _predict(options: argparse.Namespace) -> None:
    from hatnet_dense.config import load_config
    from hatnet_dense.predict import predict

    config = load_config(options.config, options.cfg_options)
    record = predict(config, options.checkpoint, options.images, options.out, options.score_threshold, options.device)
    print(f"predictions of {len(record['images'])} images: {options.out / 'predictions.json'}")


def _flops(options: argparse.Namespace) -> None:
    from hatnet_dense.config import load_config
    from hatnet_dense.flops import count

    height, width = options.size
    row = {"config": options.config, "height": height, "width": width}
    row |= count(load_config(options.config, options.cfg_options), height, width)
    if options.format == "json":
        print(json.dumps(row, indent=2))
        return
    print(f"{options.config} at {height}×{width}, one multiply-add is one FLOP")
    for prefix, name in (("", "whole model"), ("backbone_", "backbone")):
        print(
            f"{name:>12}: {row[prefix + 'params'] / 1e6:.2f} M parameters, {row[prefix + 'flops_complete'] / 1e9:.1f} "
            f"GFLOPs, {row[prefix + 'flops_paper'] / 1e9:.1f} without the matrix products of the attention"
        )


def _configs(options: argparse.Namespace) -> None:
    from hatnet_dense.config import config_names, config_path

    for name in options.names or config_names():
        print(config_path(name) if options.names else name)


def _doctor(options: argparse.Namespace) -> int:
    findings = examine()
    if options.format == "json":
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        return 0 if usable(findings) else 1
    print(f"hatnet-dense {__version__}, Python {sys.version.split()[0]}")
    for finding in findings:
        print(f"{finding.name:>14}  {MARKS[finding.state]:<6}  {finding.distribution}")
        if finding.state == "broken":
            print(f"{'':>14}  {finding.reason}")
    for finding in findings:
        if finding.state == "broken":
            print(f"to mend {finding.name}:\n  {finding.command}")
    optional = [finding for finding in findings if finding.state == "absent"]
    for finding in optional:
        print(f"to add {finding.name}:\n  {finding.command}")
    print("ready" if usable(findings) else "not ready: mend what is broken, from above to below")
    return 0 if usable(findings) else 1


def _work_dir(options: argparse.Namespace, config: Any) -> Path:
    """From the command line, or the config, or named after it: the libraries' own order."""
    stem = Path(options.config).name.removesuffix(".py")
    return Path(options.work_dir or config.get("work_dir") or Path("work_dirs") / stem)


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
        "exit status: 0; 1 after an error; 2 for a wrong command line",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    train = command("train", _train, "train the model of a config")
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

    test = command("test", _test, "evaluate a checkpoint with the evaluators of its config")
    _add_config(test)
    _add_checkpoint(test)
    test.add_argument("--out", type=Path, metavar="FILE", help="write the metrics to a JSON file, too")
    test.add_argument("--show-dir", type=Path, metavar="DIR", help="draw truth and prediction of every image")
    _add_run(test)

    predict = command("predict", _predict, "predict image files: pictures, and JSON or label images")
    _add_config(predict)
    _add_checkpoint(predict)
    predict.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image file, or folder of images")
    predict.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    predict.add_argument(
        "--score-threshold", type=float, default=0.3, metavar="SCORE", help="of the boxes drawn (default 0.3)"
    )
    predict.add_argument("--device", default="auto", help="auto, cpu, cuda:0, ... (default auto)")

    flops = command("flops", _flops, "count parameters and FLOPs of the model of a config")
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

    configs = command("configs", _configs, "list the configs of this package, or print the paths of some")
    configs.add_argument("names", nargs="*", metavar="NAME", help="print its path, for the libraries' own tools")

    doctor = command("doctor", _doctor, "say what is installed, whether it fits, and what mends it")
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
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint that a training run wrote")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="folder of the run (default work_dirs/ and the config's name)"
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="none",
        help="what started the processes: pytorch is torchrun (default none: one process)",
    )


def _side(text: str) -> int:
    if not text.isdecimal() or int(text) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of pixels from 32 up")
    return int(text)
