"""Findings of the doctor in installations that are broken in known ways."""

import importlib.metadata
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hatnet_dense.compat import BEYOND, LOWEST, MMCV, OPENCV, SETUPTOOLS, TORCH, examine, require, usable
from hatnet_testing import check, error_line

OFFICIAL = {found.metadata["Name"] for found in importlib.metadata.distributions()}


def with_path(folder):
    """Return an environment in which Python imports from ``folder`` first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def doctor(folder, *arguments):
    """Run ``hatnet-dense doctor`` with the modules in ``folder`` instead of the installed ones."""
    return subprocess.run(
        [sys.executable, "-m", "hatnet_dense", *(arguments or ("doctor", "--format", "json"))],
        env=with_path(folder),
        capture_output=True,
        text=True,
        check=False,
    )


def findings(folder, *arguments):
    result = doctor(folder, *arguments)
    return result.returncode, {finding["name"]: finding for finding in json.loads(result.stdout)}


def test_what_the_tests_run_on_is_found_to_be_ready():
    found = {finding.name: finding for finding in examine()}
    assert {found[name].state for name in ("torch", "pkg_resources", "cv2", "mmengine", "mmcv", "mmdet", "mmseg")} == {
        "ok"
    }
    assert found["mmcv"].distribution.startswith(("mmcv ", "onedl-mmcv "))
    assert usable(list(found.values()))
    require("mmdet")
    require("mmseg")


def test_a_setuptools_without_pkg_resources_and_a_torchvision_of_another_torch_are_named_with_what_fixes_them(
    tmp_path,
):
    (tmp_path / "pkg_resources.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pkg_resources'\", name='pkg_resources')"
    )
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    status, found = findings(tmp_path)
    assert status == 1
    assert found["pkg_resources"]["state"] == "broken"
    assert found["pkg_resources"]["command"] == SETUPTOOLS
    assert found["torchvision"]["reason"] == "operator torchvision::nms does not exist"
    assert "torchvision" in found["torchvision"]["command"]


@pytest.mark.parametrize(("version", "state"), [("2.9.1", "broken"), ("2.10.0+cpu", "ok"), ("2.14.0+cu130", "broken")])
def test_a_torch_that_mmcv_does_not_compile_with_is_named_with_the_command_that_fits(version, state, tmp_path):
    (tmp_path / "torch.py").write_text(f"__version__ = {version!r}")
    _, found = findings(tmp_path)
    assert found["torch"]["state"] == state
    if state == "broken":
        assert version in found["torch"]["reason"]
        assert found["torch"]["command"] == TORCH


def test_the_doctor_and_the_requirements_name_the_same_torch():
    needed = map(Requirement, importlib.metadata.requires("hatnet-dense"))
    (torch,) = [one for one in needed if one.name == "torch"]
    low, high = (".".join(map(str, bound)) for bound in (LOWEST, BEYOND))
    assert {str(bound) for bound in torch.specifier} == {f">={low}", f"<{high}"}


def test_an_mmcv_without_its_operators_is_named_with_the_command_that_compiles_them(tmp_path):
    installed = Path(find_spec("mmcv").submodule_search_locations[0])
    (tmp_path / "mmcv").mkdir()
    for path in installed.iterdir():
        if not path.name.startswith("_ext"):
            (tmp_path / "mmcv" / path.name).symlink_to(path)
    status, found = findings(tmp_path)
    assert status == 1
    assert found["mmcv"]["state"] == "broken"
    assert "operators" in found["mmcv"]["reason"]
    assert found["mmcv"]["command"] == MMCV
    refused = doctor(tmp_path, "flops", "retinanet_hatnet-t_fpn_1x_coco")
    assert refused.returncode == 1
    error_line(refused.stderr, "hatnet-dense flops", "mmcv", found["mmcv"]["reason"])


@pytest.mark.skipif("mmdet" not in OFFICIAL, reason="the forks take other versions")
def test_an_mmcv_that_mmdetection_refuses_is_named_with_both_versions(tmp_path):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("__version__ = '2.2.0'")
    status, found = findings(tmp_path)
    assert status == 1
    check(found["mmcv"]["reason"], "mmcv", "2.2.0", "2.0.0rc4", "mmdet", "mmseg")
    assert found["mmdet"]["state"] == "broken"
    assert found["mmdet"]["command"] == MMCV  # the cause


def test_an_opencv_without_its_graphical_libraries_is_in_the_table_with_what_fixes_it(tmp_path):
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')")
    result = doctor(tmp_path, "doctor")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert any(line.split()[:2] == ["cv2", "BROKEN"] for line in lines)
    assert lines[lines.index("to fix cv2:") + 1].strip() == OPENCV


def test_a_deepspeed_that_cannot_be_imported_does_not_stop_the_doctor(tmp_path):
    (tmp_path / "deepspeed.py").write_text("raise RuntimeError('CUDA_HOME does not exist')")
    status, found = findings(tmp_path)
    assert status == 1
    assert found["deepspeed"]["reason"] == "CUDA_HOME does not exist"


def test_without_mmcv_the_doctor_names_the_command_that_compiles_it(tmp_path):
    (tmp_path / "mmcv.py").write_text("raise ModuleNotFoundError(\"No module named 'mmcv'\", name='mmcv')")
    status, found = findings(tmp_path)
    assert status == 1
    assert found["mmcv"]["state"] == "broken"
    assert (found["mmcv"]["reason"], found["mmcv"]["command"]) == ("No module named 'mmcv'", MMCV)
    assert found["mmdet"]["state"] == "broken"
    assert found["mmdet"]["command"] == MMCV


def test_without_mmengine_the_doctor_runs_and_all_else_says_that_it_is_missing(tmp_path):
    (tmp_path / "mmengine.py").write_text("raise ModuleNotFoundError(\"No module named 'mmengine'\", name='mmengine')")
    status, found = findings(tmp_path)
    assert status == 1
    assert found["mmengine"]["state"] == "broken"
    refused = doctor(tmp_path, "train", "retinanet_hatnet-t_fpn_1x_coco")
    assert refused.returncode == 1
    error_line(refused.stderr, "hatnet-dense train", "mmengine")
    assert "Traceback" not in refused.stderr
    code = "import hatnet_dense; hatnet_dense.HATNetBackbone"
    imported = subprocess.run([sys.executable, "-c", code], env=with_path(tmp_path), capture_output=True, text=True)
    (line,) = [line for line in imported.stderr.splitlines() if line.startswith("ImportError: ")]
    check(line, "hatnet_dense.HATNetBackbone", "No module named 'mmengine'", "hatnet-dense doctor")
