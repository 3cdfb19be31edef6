"""Real checkpoints of DeepSpeed, written by two processes, and damaged or hostile ones."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from hatnet_core import create_model, load_checkpoint, read_metadata, save_checkpoint
from hatnet_core.checkpoint import find_metadata, load_model
from hatnet_testing import raises

pytestmark = pytest.mark.long

SCRIPT = """
import sys
import deepspeed, torch
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict as export
from hatnet_core import create_model

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # only inference uses it, and it would be compiled
torch.set_num_threads(1)
torch.manual_seed(0)
out = sys.argv[1]
for name, stage in (("zero0", 0), ("zero2", 2), ("zero3", 3)):
    model = create_model("hatnet_tiny", num_classes=3)
    config = {"train_batch_size": 2, "zero_optimization": {"stage": stage}}
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    if stage == 2:
        config["bf16"] = {"enabled": True}
    torch.manual_seed(stage)
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    expected = {n: p.detach().clone() for n, p in model.state_dict().items()}
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    engine.save_checkpoint(f"{out}/{name}", tag="last")
    if engine.global_rank == 0:
        torch.save(expected, f"{out}/{name}.pth")
        if stage:
            export(f"{out}/{name}", f"{out}/{name}.pickled")
            export(f"{out}/{name}", f"{out}/{name}.safe", safe_serialization=True)
# a process that leaves while the other still writes may be aborted, and then ends both
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Checkpoints zero0, zero2 (in bf16) and zero3 with the weights they hold, by two processes."""
    out = tmp_path_factory.mktemp("zero")
    (out / "write.py").write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen([*torchrun, out / "write.py", out], start_new_session=True, stderr=subprocess.PIPE)
    try:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return out


def assert_weights(model, expected, name):
    tolerance = {"rtol": 2**-8, "atol": 0} if name == "zero2" else {"rtol": 0, "atol": 0}  # DeepSpeed was given bf16
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[key], **tolerance)


@pytest.mark.parametrize("folder", ["", "last"], ids=["by latest", "by tag"])
@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3"])
def test_the_weights_of_any_stage_are_put_together_from_the_parts_of_all_processes(name, folder, written, capfd):
    model = create_model("hatnet_tiny", num_classes=3)
    assert load_checkpoint(model, written / name / folder) == []
    assert_weights(model, torch.load(written / f"{name}.pth"), name)
    capfd.readouterr()  # once, DeepSpeed names the device that it found
    load_checkpoint(model, written / name / folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
@pytest.mark.parametrize("file", ["pickled/pytorch_model.bin", "safe/model.safetensors"])
def test_weights_that_deepspeed_itself_exports_load(name, file, written):
    model = create_model("hatnet_tiny", num_classes=3)
    assert load_checkpoint(model, written / f"{name}.{file}") == []
    assert_weights(model, torch.load(written / f"{name}.pth"), name)


def test_a_folder_of_deepspeed_does_not_say_which_model_it_holds(written):
    assert find_metadata(written / "zero3") == {}
    with raises(ValueError, written / "zero3", "model.safetensors"):
        read_metadata(written / "zero3")
    with raises(ValueError, written / "zero3", "variant=NAME"):
        load_model(written / "zero3")


@pytest.mark.parametrize("damage", ["missing part", "short part", "hostile part"])
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_damaged_and_hostile_parts_are_refused_and_nothing_of_them_runs(damage, name, written, tmp_path):
    for file in (written / name / "last").iterdir():
        (tmp_path / file.name).hardlink_to(file)
    victim = sorted(tmp_path.glob("*rank_1_*optim_states.pt"))[0]
    content = victim.read_bytes()
    victim.unlink()
    if damage == "short part":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "hostile part":
        torch.save({"optimizer_state_dict": Hostile(tmp_path / "owned")}, victim)
    model = create_model("hatnet_tiny", num_classes=3)
    before = model.head.weight.clone()
    with raises(ValueError, tmp_path, "DeepSpeed") as error:
        load_checkpoint(model, tmp_path)
    assert error.value.__cause__ is not None
    assert torch.equal(model.head.weight, before)
    assert not (tmp_path / "owned").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


class Hostile:
    """Makes a file when unpickled without restriction."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with raises(ValueError, tmp_path, "model.safetensors", "*_model_states.pt"):
        load_checkpoint(create_model("hatnet_tiny"), tmp_path)


@pytest.mark.parametrize("tag", ["../elsewhere", "/etc", "a/b", "..", ".", "x" * 5000])
def test_latest_does_not_lead_out_of_its_folder(tag, tmp_path):
    (tmp_path / "latest").write_text(tag)
    with raises(ValueError, tmp_path / "latest", f"'{tag[:80]}'"):
        load_checkpoint(create_model("hatnet_tiny"), tmp_path)


def test_without_deepspeed_the_extra_is_named(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed.utils.zero_to_fp32", None)
    with raises(ImportError, "DeepSpeed", "hatnet-core[deepspeed]"):
        load_checkpoint(create_model("hatnet_tiny", num_classes=3), written / "zero2")


def test_a_checkpoint_of_another_model_is_refused(written):
    with raises(ValueError, written / "zero2", "hatnet_tiny", 3, "hatnet_small"):
        load_checkpoint(create_model("hatnet_small"), written / "zero2")


def test_an_exported_checkpoint_keeps_what_is_said_beside_the_weights(tmp_path):
    from hatnet_core.cli import main

    model = create_model("hatnet_tiny", num_classes=3)
    save_checkpoint(model, tmp_path / "a.safetensors", {"classes": ["a", "b", "c"]})
    assert main(["--checkpoint", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "b.safetensors")]) == 0
    assert read_metadata(tmp_path / "b.safetensors") == read_metadata(tmp_path / "a.safetensors")
