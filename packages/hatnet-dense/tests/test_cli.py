"""The command: help, lists, and wrong command lines."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hatnet_dense.cli import main
from hatnet_dense.config import CONFIGS, config_names
from hatnet_dense.errors import said
from hatnet_testing import check, error_line, usage_error


def status(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.parametrize(
    "command", [[], ["check"], ["train"], ["test"], ["predict"], ["flops"], ["configs"], ["doctor"]]
)
def test_every_command_has_a_help_that_fits_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert status([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: hatnet-dense")
    assert all(len(line) <= 80 for line in text.splitlines() if re.match(r"[│ ]+--", line))


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
    check(table, f"{row['params'] / 1e6:.2f}", f"{row['flops_complete'] / 1e9:.1f}")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("", ["check", "train"]),
        ("fly", ["fly", "check", "train", "test", "predict", "flops", "configs", "doctor"]),
        ("predikt", ["predikt", "predict"]),
        ("train", ["CONFIG"]),
        ("train c --work-dri x", ["--work-dri", "--work-dir"]),
        ("train c --zero-stage 4", ["--zero-stage", 4, 1, 2, 3]),
        ("train c --amp int8", ["--amp", "int8", "float16", "bfloat16"]),
        ("train c --cfg-options x", ["--cfg-options", "x", "KEY=VALUE"]),
        ("train c --work-dir=", ["--work-dir"]),
        ("train c --launcher magic", ["--launcher", "magic"]),
        ("test c", ["PATH"]),
        ("predict c d e", ["--out"]),
        ("predict c d e --out o --score-threshold 2", ["--score-threshold", 2, 0, 1]),
        ("predict c d e --out o --device meta", ["--device", "'meta'"]),
        ("predict c d e --out o --device cuda:x", ["--device", "'cuda:x'"]),
        ("predict c d e --out o --device=", ["--device", "''"]),
        ("predict c d e --out o --on-bad-image skip", ["--on-bad-image", "skip", "strict", "replace"]),
        ("flops c --format xml", ["--format", "xml", "table", "json"]),
        ("flops c --size 64 64 64", ["--size"]),
        ("flops c --size 31 x", ["--size", 31, 32, 4096]),
        ("flops c --size 64 99999999", ["--size", 99999999, 32, 4096]),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(line, named, capsys):
    assert status(line.split()) == 2
    usage_error(capsys.readouterr().err, *named)


CONFIG = "retinanet_hatnet-t_fpn_1x_coco"

CUSTOM_IMPORTS = "from mmengine.utils import import_modules_from_strings as load; load(['hatnet_dense'])"
"""What MMEngine does with ``custom_imports``."""


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("train absent", ["absent", "hatnet-dense configs"]),
        ("train retnanet_hatnet-t_fpn_1x_coco", ["retnanet_hatnet-t_fpn_1x_coco", CONFIG]),
        ("flops mmdet::absent.py", ["absent.py", "mmdet"]),
        ("train CONFIG --work-dir OUT --amp", ["--amp", "float16", "GPU"]),
        ("train CONFIG --work-dir OUT --launcher mpi", ["launcher", "pytorch", "mpi"]),
        ("train CONFIG --work-dir OUT --resume absent.pth", ["absent.pth"]),
        ("train CONFIG --work-dir OUT --resume http://127.0.0.1:9/x.pth", ["http://127.0.0.1:9/x.pth"]),
        ("train CONFIG --work-dir OUT --cfg-options load_from=http://127.0.0.1:9/x.pth", ["http://127.0.0.1:9/x.pth"]),
        ("train CONFIG --work-dir OUT --cfg-options model.neck.type=XPN", ["KeyError", "XPN"]),
        ("test CONFIG absent.pth --work-dir OUT", ["absent.pth"]),
        ("test CONFIG absent.pth --out absent/m.json", ["--out", "absent/m.json"]),
        ("test CONFIG absent.pth --out EMPTY", ["--out", "EMPTY"]),
        ("test CONFIG PAGE --work-dir OUT", ["PAGE"]),
        ("test CONFIG EMPTY --work-dir OUT", ["EMPTY"]),
        ("predict CONFIG absent.pth absent.jpg --out OUT", ["absent.pth"]),
        ("predict CONFIG absent.pth EMPTY --out OUT", ["EMPTY"]),
    ],
)
def test_bad_input_ends_in_one_line_with_status_1(line, named, tmp_path, monkeypatch, capsys):
    if "--amp" in line or "mpi" in line:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.pth").write_text("<html>")
    places = {"OUT": tmp_path / "out", "EMPTY": tmp_path / "empty", "PAGE": tmp_path / "page.pth", "CONFIG": CONFIG}
    assert main([str(places.get(word, word)) for word in line.split()]) == 1
    error_line(capsys.readouterr().err, f"hatnet-dense {line.split()[0]}", *(places.get(name, name) for name in named))
    assert not list((tmp_path / "out").glob("*.pth"))


def test_the_dataset_that_is_not_there_is_named(tmp_path, capsys):
    options = [
        "--cfg-options",
        f"train_dataloader.dataset.data_root={tmp_path}/absent/",
        "model.backbone.init_cfg=None",
    ]
    assert main(["train", CONFIG, "--work-dir", str(tmp_path / "out"), *options]) == 1
    path = tmp_path / "absent" / "annotations" / "instances_train2017.json"
    error_line(capsys.readouterr().err, "hatnet-dense train", path)


def test_help_waits_for_no_library_and_says_nothing_else():
    code = "import sys, hatnet_dense.cli as cli\n"
    code += "try: cli.main(['train', '--help'])\nfinally: print(*sys.modules, file=sys.stdout)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("usage: hatnet-dense train")
    assert run.stderr == ""
    assert not {"torch", "mmengine", "deepspeed"} & set(run.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code", ["from mmengine import registry; import hatnet_dense", "import hatnet_dense.register", CUSTOM_IMPORTS]
)
def test_what_a_config_imports_registers_all_of_it_and_leaves_deepspeed_alone(code):
    code += "; import sys; from mmengine import registry as r; print('deepspeed' in sys.modules, "
    code += "'HATNetBackbone' in r.MODELS, 'DataCheckHook' in r.HOOKS, 'PlainCheckpointHook' in r.HOOKS, "
    code += "'LayerDecayConstructor' in r.OPTIM_WRAPPER_CONSTRUCTORS, 'ZeroStrategy' in r.STRATEGIES)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", *["True"] * 5]
    assert run.stderr == ""


def test_the_package_alone_imports_no_library_and_has_its_classes_on_request():
    code = "import sys, hatnet_dense; print({'torch', 'mmengine'} & set(sys.modules)); "
    code += "print(hatnet_dense.HATNetBackbone.__module__)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["set()", "hatnet_dense.backbone"]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (KeyError("neck"), ["KeyError: 'neck'", "--verbose"]),
        (RuntimeError("first\nsecond"), ["RuntimeError: first", "--verbose"]),
        (FileNotFoundError(2, "No such file", "a"), ["a", "--cfg-options"]),
    ],
)
def test_whatever_the_libraries_raise_is_one_line(error, named, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr("hatnet_dense.config.config_names", fail)
    assert main(["configs"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    error_line(line, "hatnet-dense configs", *named)


def test_the_installed_command_ends_as_it_does_in_process():
    command = [Path(sys.executable).with_name("hatnet-dense"), "configs", "retinanet"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (1, "")
    (line,) = run.stderr.splitlines()
    error_line(line, "hatnet-dense configs", "retinanet", CONFIG)


def test_a_message_of_a_loading_process_is_its_last_line():
    text = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\n"
    text += "ValueError: a.jpg"
    assert said(ValueError(text)) == "a.jpg"


@pytest.mark.parametrize(
    "arguments",
    [["predict", "c", "d", "e", "--out"], ["train", CONFIG, "--work-dir"], ["test", CONFIG, "c", "--show-dir"]],
)
@pytest.mark.parametrize("place", ["FILE", "FILE/below"])
def test_a_folder_that_cannot_be_one_is_refused_before_the_work(arguments, place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = place.replace("FILE", str(tmp_path / "file"))
    assert main([*arguments, folder]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    error_line(line, f"hatnet-dense {arguments[0]}", arguments[-1], repr(folder))
    assert (tmp_path / "file").read_text() == ""


def test_the_module_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "hatnet_dense", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith("hatnet-dense ")


def test_the_files_of_the_configs_are_part_of_the_package():
    assert Path(CONFIGS / "_base_" / "hatnet.py").is_file()
