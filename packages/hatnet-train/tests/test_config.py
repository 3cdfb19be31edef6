import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hatnet_testing import check, raises, usage_error
from hatnet_train import TrainConfig, build_config
from hatnet_train import config as config_module
from hatnet_train.config import FIELDS, FieldError, field_help


def test_every_field_says_what_it_is():
    assert all(len(field_help(name)) > 15 for name in FIELDS)


def test_the_rate_is_scaled_linearly_with_the_batch_where_a_batch_is_given_for_it():
    values = {"data": "synthetic", "lr": 1e-3, "lr_batch_size": 1024}
    assert build_config("imagenet", {**values, "batch_size": 4096}).peak_lr == pytest.approx(4e-3)
    assert build_config("imagenet", {**values, "batch_size": 256}).peak_lr == pytest.approx(2.5e-4)
    assert build_config("imagenet", {**values, "batch_size": 256, "lr_batch_size": 0}).peak_lr == 1e-3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("variant", "resnet50"),
        ("image_size", 31),
        ("image_size", 4096),
        ("grid_sizes", (8, 0, 8)),
        ("pool_sizes", (-1, 4, 2)),
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr_batch_size", -1),
        ("min_lr", 1e-3),
        ("warmup_epochs", 7.0),
        ("weight_decay", -0.1),
        ("clip_grad", -1.0),
        ("ema_decay", 1.0),
        ("label_smoothing", 1.0),
        ("drop_path_rate", 1.0),
        ("drop_rate", -0.5),
        ("min_scale", 0.0),
        ("max_shift", 32),
        ("hflip", 1.5),
        ("random_erasing", -0.1),
        ("repeats", 0),
        ("mixup", -1.0),
        ("cutmix", float("inf")),
        ("crop_fraction", 0.0),
        ("precision", "fp8"),
        ("zero_stage", 4),
        ("accumulation", 0),
        ("workers", -1),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with raises(ValueError, field, value):
        build_config("digits", {field: value})


def test_a_bound_that_is_another_field_is_named():
    for given, named in (
        ({"min_lr": 1e-3}, "lr=0.0001"),
        ({"warmup_epochs": 7.0}, "epochs=7"),
        ({"max_shift": 32}, "image_size=32"),
        ({"max_shift": 2, "min_scale": 0.5}, "min_scale"),
    ):
        with raises(ValueError, *next(iter(given.items())), named):
            build_config("digits", given)


def test_values_of_json_become_those_of_the_fields():
    config = build_config("digits", {"grid_sizes": [4, 4, 4], "lr": 1})
    assert config.model.grid_sizes == (4, 4, 4)
    assert isinstance(config.optimisation.lr, float)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("values", "name"), [({"batchsize": 3}, "batchsize"), ({"epochs": "7"}, "epochs")])
def test_an_unknown_field_and_a_value_of_another_type_are_refused(values, name):
    with raises(FieldError, name):
        build_config("digits", values)


def test_a_missing_field_is_refused():
    with raises(FieldError, "data"):
        build_config("imagenet", {})
    with raises(FieldError, "variant"):
        TrainConfig.from_dict({"data": "digits"})


NEW = """
    patience: Annotated[int, MAY_CHANGE, Meta(ge=0, le=9)] = 4
    \"\"\"Epochs without a better accuracy before the run ends.\"\"\"

    tolerance: Annotated[int, Meta(ge=0)] = 0
    \"\"\"Smallest improvement.\"\"\"

"""

TRY = """
import contextlib, io, json
from hatnet_train import build_config, cli
from hatnet_train.config import field_help
from hatnet_train.run.state import differences

def run(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.train(["config", "--recipe", "digits", *words])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()

old = build_config("digits", {}).to_dict()
del old["patience"], old["tolerance"]
resumed = [differences(old, {}, build_config("digits", changed).to_dict(), {})
           for changed in ({}, {"patience": 5}, {"tolerance": 1})]
calls = [run("--help"), run(), run("--patience", "5"), *(run("--patience", bad) for bad in ("10", "-1", "many"))]
print(json.dumps([field_help("patience"), resumed, calls]))
"""


def test_one_edit_adds_a_field_to_flags_help_checks_json_and_resume(tmp_path):
    copy = tmp_path / "hatnet_train"
    shutil.copytree(Path(config_module.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    source = (copy / "config.py").read_text()
    (copy / "config.py").write_text(source.replace("    max_skipped_steps:", NEW + "    max_skipped_steps:", 1))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    text, resumed, ((_, shown, _), (_, default, _), (_, given, _), *refused) = json.loads(done.stdout.splitlines()[-1])
    assert text == "Epochs without a better accuracy before the run ends."
    assert {"--patience", "N", "4"} <= set(re.findall(r"[\w-]+", shown))
    assert [json.loads(printed)["patience"] for printed in (default, given)] == [4, 5]
    for value, (status, _, error) in zip(("10", "-1", "many"), refused, strict=True):
        assert status == 2
        usage_error(error, "--patience", value)
    assert resumed[:2] == ["", ""]
    check(resumed[2], "--tolerance", 0, 1)
