"""The command: help, lists, and wrong command lines."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hatnet_dense.cli import main
from hatnet_dense.config import CONFIGS, config_names
from hatnet_dense.errors import said


def status(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.parametrize("command", [[], ["train"], ["test"], ["predict"], ["flops"], ["configs"], ["doctor"]])
def test_every_command_has_a_help(command, capsys):
    assert status([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: hatnet-dense")
    assert max(map(len, text.splitlines())) < 130


def test_configs_lists_the_names_and_gives_the_path_of_one(capsys):
    assert main(["configs"]) == 0
    assert capsys.readouterr().out.split() == config_names()
    assert main(["configs", "retinanet_hatnet-t_fpn_1x_coco"]) == 0
    assert capsys.readouterr().out.strip() == str(CONFIGS / "retinanet_hatnet-t_fpn_1x_coco.py")


def test_flops_as_table_and_as_json(capsys):
    command = ["flops", "retinanet_hatnet-t_fpn_1x_coco", "--size", "64", "96"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert main([*command, "--format", "json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["params"] == 22158772
    assert f"{row['params'] / 1e6:.2f} M parameters" in table
    assert f"{row['flops_complete'] / 1e9:.1f} GFLOPs" in table


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "the following arguments are required: CONFIG"),
        (["predict", "c", "d", "e"], "the following arguments are required: --out"),
        (["train", "c", "--launcher", "magic"], "invalid choice: 'magic'"),
        (["flops", "c", "--size", "31", "x"], "'31' is not a whole number of pixels from 32 to 4096"),
        (["flops", "c", "--size", "64", "99999999"], "'99999999' is not a whole number of pixels from 32 to 4096"),
    ],
)
def test_a_wrong_command_line_ends_in_one_line_with_status_2(arguments, message, capsys):
    assert status(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hatnet-dense")
    assert message in line


OPTION = ["--cfg-options"]
CONFIG = "retinanet_hatnet-t_fpn_1x_coco"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent"], "no config absent: expected a file, or a name that 'hatnet-dense configs' lists"),
        (["train", CONFIG, "--work-dir", "OUT", "--cfg-options", "x"], "--cfg-options must be KEY=VALUE, got 'x'"),
        (["train", CONFIG, "--work-dir", "OUT", "--amp"], "--amp float16 needs a GPU"),
        (["train", CONFIG, "--work-dir", "OUT", "--launcher", "mpi"], "launcher must be none or pytorch, got mpi"),
        (["train", CONFIG, "--work-dir", "OUT", "--resume", "absent.pth"], "no checkpoint at absent.pth"),
        (
            ["test", CONFIG, "absent.pth", "--work-dir", "OUT"],
            "no checkpoint at absent.pth: expected an existing file",
        ),
        (["test", CONFIG, "absent.pth", "--out", "absent/m.json"], "--out must be a file in a folder that exists"),
        (["test", CONFIG, "absent.pth", "--out", "EMPTY"], "--out must be a file in a folder that exists, got "),
        (["predict", CONFIG, "absent.pth", "absent.jpg", "--out", "OUT"], "no image at absent.jpg"),
        (["predict", CONFIG, "absent.pth", "EMPTY", "--out", "OUT"], "no images in "),
        (["test", CONFIG, "PAGE", "--work-dir", "OUT"], "page.pth: expected a checkpoint of tensors and plain values"),
        (["test", CONFIG, "EMPTY", "--work-dir", "OUT"], "is a folder: expected a file"),
        (
            ["train", CONFIG, "--work-dir", "OUT", "--resume", "http://127.0.0.1:9/x.pth"],
            "is an address: expected a file",
        ),
        (["train", CONFIG, "--work-dir", "OUT", *OPTION, "load_from=http://127.0.0.1:9/x.pth"], "is an address"),
        (
            ["train", CONFIG, "--work-dir", "OUT", *OPTION, "model.neck.type=XPN"],
            "cannot train with this config: KeyError",
        ),
        (["predict", CONFIG, "absent.pth", "PAGE", "--out", "OUT"], "page.pth: expected an image"),
        (["predict", CONFIG, "absent.pth", "EMPTY", "--out", "OUT", "--score-threshold", "2"], "from 0 to 1, got 2"),
    ],
)
def test_bad_input_ends_in_one_line_with_status_1(arguments, message, tmp_path, monkeypatch, capsys):
    if "--amp" in arguments or "mpi" in arguments:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.pth").write_text("<html>")
    places = {"OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty"), "PAGE": str(tmp_path / "page.pth")}
    assert main([places.get(text, text) for text in arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.pth"))


def test_the_dataset_that_is_not_there_is_named(tmp_path, capsys):
    options = [
        "--cfg-options",
        f"train_dataloader.dataset.data_root={tmp_path}/absent/",
        "model.backbone.init_cfg=None",
    ]
    assert main(["train", CONFIG, "--work-dir", str(tmp_path / "out"), *options]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hatnet-dense: error: ")
    assert f"{tmp_path}/absent/annotations/instances_train2017.json" in line


def test_help_waits_for_no_library_and_says_nothing_else():
    code = "import sys, hatnet_dense_cli as cli\n"
    code += "try: cli.main(['train', '--help'])\nfinally: print(*sys.modules, file=sys.stdout)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: hatnet-dense train")
    assert run.stderr == ""
    assert not {"torch", "mmengine", "deepspeed"} & set(run.stdout.splitlines()[-1].split())


def test_importing_the_package_registers_all_of_it_and_leaves_deepspeed_alone():
    code = "import sys, hatnet_dense; from mmengine import registry as r; print('deepspeed' in sys.modules, "
    code += "'HATNetBackbone' in r.MODELS, 'DataCheckHook' in r.HOOKS, 'PlainCheckpointHook' in r.HOOKS, "
    code += "'LayerDecayConstructor' in r.OPTIM_WRAPPER_CONSTRUCTORS, 'ZeroStrategy' in r.STRATEGIES)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", *["True"] * 5]
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyError("neck"), 1, "hatnet-dense: error: KeyError: 'neck'"),
        (RuntimeError("first\nsecond"), 1, "hatnet-dense: error: RuntimeError: first"),
        (BrokenPipeError(32, "Broken pipe"), 1, "hatnet-dense: error: [Errno 32] Broken pipe"),
        (AssertionError(), 1, "hatnet-dense: error: AssertionError"),
        (KeyboardInterrupt(), 130, "hatnet-dense: interrupted"),
    ],
)
def test_whatever_ends_a_command_is_one_line_and_no_success(error, status, line, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("hatnet_dense.config.config_names", fail)
    assert main(["configs"]) == status
    assert capsys.readouterr().err == f"{line}\n"


def test_a_variable_shows_where_an_error_comes_from(monkeypatch, capsys):
    monkeypatch.setenv("HATNET_TRACEBACK", "1")
    assert main(["configs", "absent"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback (most recent call last)")
    assert text.splitlines()[-1].startswith("hatnet-dense: error: no config absent")


def test_a_reader_that_goes_away_ends_nothing():
    code = "import os, sys; os.close(1); r, w = os.pipe(); os.close(r); assert w == 1 or os.dup2(w, 1) == 1\n"
    code += "from hatnet_dense_cli import main; sys.exit(main(['configs']))"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_message_of_a_loading_process_is_its_last_line():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    text += "ValueError: a.jpg"
    assert said(ValueError(text)) == "a.jpg"


@pytest.mark.parametrize(
    "arguments",
    [["predict", "c", "d", "e", "--out"], ["train", CONFIG, "--work-dir"], ["test", CONFIG, "c", "--show-dir"]],
)
@pytest.mark.parametrize("place", ["", "FILE", "FILE/below"])
def test_a_folder_that_cannot_be_one_is_refused_before_the_work(arguments, place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = place.replace("FILE", str(tmp_path / "file"))
    assert main([*arguments, folder]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"hatnet-dense: error: {arguments[-1]} must be a folder, got {folder or repr('')}"
    assert (tmp_path / "file").read_text() == ""


def test_the_module_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "hatnet_dense", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("hatnet-dense ")


def test_the_files_of_the_configs_are_part_of_the_package():
    assert Path(CONFIGS / "_base_" / "hatnet.py").is_file()
