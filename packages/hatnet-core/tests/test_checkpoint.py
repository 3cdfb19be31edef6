import argparse
import builtins
import ctypes
import datetime
import json
import os
import pickle
import struct
import sys

import pytest
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv

from conftest import SMALL
from hatnet_core import HATNet, create_model, list_models, load_checkpoint, read_metadata, save_checkpoint
from hatnet_core.checkpoint import load_model, read_checkpoint, read_state
from hatnet_core.checkpoint.matching import check_match
from hatnet_testing import check, raises


@pytest.mark.parametrize("name", list_models())
def test_every_released_parameter_is_loaded_or_knowingly_dropped(name, released_files, caplog):
    released = torch.load(released_files[name], weights_only=True)
    model = create_model(name)
    dropped = load_checkpoint(model, released_files[name])
    assert dropped == [n for n in released if ".proj_norm." in n]
    check(caplog.text, released_files[name], len(dropped), "blocks.0.0.attn.proj_norm.weight")
    # every released tensor that was not dropped is in the model, once, bit for bit
    sums = sorted(t.double().sum().item() for n, t in released.items() if n not in dropped)
    assert sorted(p.double().sum().item() for p in model.parameters()) == sums


def test_save_and_load_keep_every_bit_and_the_configuration(small_model, tmp_path):
    small_model.set_grid(pool_sizes=(16, 8, 4))
    save_checkpoint(small_model, tmp_path / "m.safetensors", {"classes": ["a", "b"]})
    record = read_metadata(tmp_path / "m.safetensors")
    assert record["classes"] == ["a", "b"]
    other = HATNet(**record["config"])
    assert load_checkpoint(other, tmp_path / "m.safetensors") == []
    assert other.config == small_model.config
    for p, q in zip(small_model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [f.name for f in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_folder_of_a_run_stands_for_the_weights_in_it(small_model, tmp_path):
    save_checkpoint(small_model, tmp_path / "model.safetensors", {"classes": ["a", "b"]})
    assert read_metadata(tmp_path) == read_metadata(tmp_path / "model.safetensors")
    other = HATNet(**read_metadata(tmp_path)["config"])
    assert load_checkpoint(other, tmp_path) == []
    assert all(torch.equal(p, q) for p, q in zip(small_model.parameters(), other.parameters(), strict=True))


def test_metadata_names_the_variant(tmp_path):
    save_checkpoint(create_model("hatnet_tiny", num_classes=2), tmp_path / "t.safetensors")
    assert read_metadata(tmp_path / "t.safetensors")["variant"] == "hatnet_tiny"


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(small_model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(small_model, path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_checkpoint(small_model, path, {"not json": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_a_missing_folder_is_refused(small_model, tmp_path):
    with raises(FileNotFoundError, tmp_path / "nowhere", tmp_path / "nowhere" / "m.safetensors"):
        save_checkpoint(small_model, tmp_path / "nowhere" / "m.safetensors")


def test_another_variant_is_refused_and_nothing_is_loaded(released_files):
    model = create_model("hatnet_tiny")
    before = model.head.weight.clone()
    with raises(ValueError, released_files["hatnet_small"], "hatnet_small", "hatnet_tiny", 1000):
        load_checkpoint(model, released_files["hatnet_small"])
    assert torch.equal(model.head.weight, before)


def test_another_variant_is_told_from_a_damaged_file_by_a_short_message(tmp_path):
    save_checkpoint(create_model("hatnet_tiny"), tmp_path / "tiny.safetensors")
    with raises(ValueError, "tiny.safetensors", "hatnet_small", 60, 260, "create_model('hatnet_tiny')"):
        load_checkpoint(create_model("hatnet_small", num_classes=10), tmp_path / "tiny.safetensors", drop_head=True)


def test_another_number_of_classes_is_refused(released_files):
    with raises(ValueError, "hatnet_tiny", 1000, 10, "head.weight", "drop_head"):
        load_checkpoint(create_model("hatnet_tiny", num_classes=10), released_files["hatnet_tiny"])


def test_missing_and_unknown_names_are_listed(small_model, tmp_path):
    state = small_model.state_dict()
    state["extra.weight"] = state.pop("stem.conv1.bias")
    save_file(state, tmp_path / "m.safetensors")
    with raises(ValueError, "m.safetensors", "stem.conv1.bias", "extra.weight"):
        load_checkpoint(small_model, tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "function", [read_metadata, lambda path: load_checkpoint(HATNet((8,) * 4, (1,) * 4, 8), path)]
)
@pytest.mark.parametrize("damage", ["truncated", "noise", "empty"])
def test_a_corrupt_safetensors_file_is_refused_by_path(function, damage, small_model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(small_model, path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "noise": b"\xff" * 200, "empty": b""}[damage])
    with raises(ValueError, path, "safetensors file"):
        function(path)


@pytest.mark.parametrize(
    "function", [read_metadata, lambda path: load_checkpoint(HATNet((8,) * 4, (1,) * 4, 8), path)]
)
def test_a_missing_file_is_refused_by_path(function, tmp_path):
    with raises(FileNotFoundError, tmp_path / "no.safetensors"):
        function(tmp_path / "no.safetensors")


@pytest.mark.parametrize("header", [None, {"hatnet": "{"}, {"hatnet": "[]"}, {"hatnet": json.dumps({"config": 1})}])
def test_a_foreign_safetensors_file_has_no_configuration(header, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", header)
    with raises(ValueError, tmp_path / "x.safetensors", "variant=NAME"):
        read_metadata(tmp_path / "x.safetensors")


def test_another_head_dim_which_no_shape_shows_is_refused(small_model, tmp_path):
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    other = HATNet(**{**small_model.config, "head_dim": 4})
    with raises(ValueError, "m.safetensors", "head_dim", 8, 4):
        load_checkpoint(other, tmp_path / "m.safetensors")


def test_weights_that_are_not_floating_are_refused(small_model, tmp_path):
    save_file({name: t.to(torch.int8) for name, t in small_model.state_dict().items()}, tmp_path / "m.safetensors")
    with raises(ValueError, "m.safetensors", "head.bias", torch.int8):
        load_checkpoint(small_model, tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["version", "variant", "config"])
def test_metadata_cannot_replace_what_describes_the_model(name, small_model, tmp_path):
    with raises(ValueError, "metadata", name):
        save_checkpoint(small_model, tmp_path / "m.safetensors", {name: 1})


@pytest.mark.parametrize("cut", [10, 100, 1000])
def test_a_text_or_damaged_pth_is_refused_by_path(cut, released_files, tmp_path):
    content = bytearray(released_files["hatnet_tiny"].read_bytes()[:100_000])
    content[cut] ^= 0xFF
    for name, data in {"text.pth": b"hello\n" * 9, "damaged.pth": bytes(content)}.items():
        (tmp_path / name).write_bytes(data)
        with raises(ValueError, tmp_path / name):
            load_checkpoint(create_model("hatnet_tiny"), tmp_path / name)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "backbone."])
def test_a_state_dict_is_found_in_wrappers_and_behind_prefixes(wrapper, prefix, small_model, tmp_path):
    state = {f"{prefix}{name}": t for name, t in small_model.state_dict().items()}
    torch.save({wrapper: state, "epoch": 7, "optimizer": {"lr": 0.1}}, tmp_path / "x.pth")
    other = HATNet(**small_model.config)
    assert load_checkpoint(other, tmp_path / "x.pth") == []
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), small_model.parameters(), strict=True))


def test_the_backbone_of_a_detector_is_loaded_and_the_rest_named(small_model, tmp_path, caplog):
    state = {f"backbone.model.{n}": t for n, t in small_model.state_dict().items() if not n.startswith("head.")}
    torch.save({"state_dict": {**state, "neck.weight": torch.zeros(1)}}, tmp_path / "x.pth")
    other = HATNet(**{**small_model.config, "num_classes": 0})
    assert load_checkpoint(other, tmp_path / "x.pth") == ["neck.weight"]
    check(caplog.text, tmp_path / "x.pth", "neck.weight")
    assert torch.equal(other.stem.conv1.weight, small_model.stem.conv1.weight)
    with raises(ValueError, "x.pth", "head.bias", "head.weight"):
        load_checkpoint(HATNet(**small_model.config), tmp_path / "x.pth")


def test_a_released_checkpoint_is_recognised_inside_a_wrapper(released_files, tmp_path):
    released = torch.load(released_files["hatnet_tiny"], weights_only=True)
    torch.save({"model": {f"module.{name}": t for name, t in released.items()}}, tmp_path / "x.pth")
    model = create_model("hatnet_tiny")
    assert len(load_checkpoint(model, tmp_path / "x.pth")) == 26
    assert torch.equal(model.head.bias, released["classifier.1.bias"])


@pytest.mark.parametrize("num_classes", [0, 3, 5])
def test_the_head_is_dropped_when_asked_and_only_then(num_classes, small_model, tmp_path):
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    other = HATNet(**{**small_model.config, "num_classes": num_classes})
    head = [p.clone() for p in other.head.parameters()]
    if num_classes != 5:
        with raises(ValueError, "m.safetensors", "head.weight", "head.bias"):
            load_checkpoint(other, tmp_path / "m.safetensors")
    assert load_checkpoint(other, tmp_path / "m.safetensors", drop_head=True) == ["head.bias", "head.weight"]
    assert all(torch.equal(p, q) for p, q in zip(other.head.parameters(), head, strict=True))
    assert torch.equal(other.stem.conv1.weight, small_model.stem.conv1.weight)


@pytest.mark.parametrize("in_chans", [1, 2, 4, 6, 13])
def test_weights_for_three_channels_are_adapted_as_timm_does(in_chans, small_model, tmp_path, caplog):
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    other = HATNet(**{**small_model.config, "in_chans": in_chans})
    load_checkpoint(other, tmp_path / "m.safetensors")
    expected = adapt_input_conv(in_chans, small_model.stem.conv1.weight.detach())
    torch.testing.assert_close(other.stem.conv1.weight.detach(), expected)
    check(caplog.text, "m.safetensors", "stem.conv1.weight", 3, in_chans)


def test_weights_for_another_number_of_channels_than_three_are_refused(small_model, tmp_path):
    save_checkpoint(HATNet(**{**small_model.config, "in_chans": 4}), tmp_path / "m.safetensors")
    with raises(ValueError, "stem.conv1.weight", (16, 4, 3, 3), (16, 3, 3, 3)):
        load_checkpoint(small_model, tmp_path / "m.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_by_name_and_nothing_is_loaded(value, small_model, tmp_path):
    damaged = small_model.state_dict() | {"stages.1.blocks.0.mlp.norm.bias": torch.full((16,), value)}
    torch.save(damaged, tmp_path / "x.pth")
    before = small_model.stem.conv1.weight.clone()
    with raises(ValueError, "x.pth", "finite", torch.float32, "stages.1.blocks.0.mlp.norm.bias"):
        load_checkpoint(small_model, tmp_path / "x.pth")
    assert torch.equal(small_model.stem.conv1.weight, before)


@pytest.mark.parametrize("name", ["hatnet_small_window4", "hatnet_small_no_depthwise", "hatnet_small_gelu"])
def test_an_ablation_is_named_in_metadata_and_does_not_load_into_hatnet_small(name, tmp_path):
    save_checkpoint(create_model(name, num_classes=2), tmp_path / "a.safetensors")
    assert read_metadata(tmp_path / "a.safetensors")["variant"] == name
    named = ("activation", "gelu", "silu") if "gelu" in name else (name, "hatnet_small")
    with raises(ValueError, "a.safetensors", *named):
        load_checkpoint(create_model("hatnet_small", num_classes=2), tmp_path / "a.safetensors")


def test_a_file_of_the_first_version_without_the_newer_arguments_loads(small_model, tmp_path):
    older = (
        "embed_dims",
        "depths",
        "head_dim",
        "kernel_sizes",
        "mlp_ratios",
        "grid_sizes",
        "pool_sizes",
        "num_classes",
    )
    record = {"version": "0.1.0", "variant": None, "config": {name: small_model.config[name] for name in older}}
    save_file(small_model.state_dict(), tmp_path / "m.safetensors", {"hatnet": json.dumps(record)})
    other = HATNet(**read_metadata(tmp_path / "m.safetensors")["config"])
    assert load_checkpoint(other, tmp_path / "m.safetensors") == []


def test_a_pruned_model_is_not_saved(small_model, tmp_path):
    small_model.prune_intermediate_layers((0, 1))
    with raises(ValueError, "m.safetensors", "pruned", 2):
        save_checkpoint(small_model, tmp_path / "m.safetensors")


def test_of_many_missing_names_the_first_and_their_number_are_given(small_model, tmp_path):
    save_file({"stem.conv2.weight": small_model.stem.conv2.weight.detach()}, tmp_path / "m.safetensors")
    missing = len(list(small_model.parameters())) - 1
    with raises(ValueError, "m.safetensors", "head.bias", "head.weight", missing - 3) as error:
        load_checkpoint(small_model, tmp_path / "m.safetensors")
    assert len(str(error.value)) < 500


def test_values_that_overflow_the_dtype_of_the_model_are_refused(small_model, tmp_path):
    torch.save(small_model.state_dict() | {"head.bias": torch.full((5,), 1e6)}, tmp_path / "x.pth")
    with raises(ValueError, "x.pth", "finite", torch.float16, "head.bias"):
        load_checkpoint(small_model.half(), tmp_path / "x.pth")


def test_a_kept_head_is_not_judged_as_if_it_were_in_the_file(small_model, tmp_path):
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    torch.nn.init.constant_(small_model.head.bias, float("nan"))
    load_checkpoint(small_model, tmp_path / "m.safetensors", drop_head=True)
    assert small_model.head.bias.isnan().all()


def test_a_model_without_storage_is_refused(small_model, tmp_path):
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    with raises(ValueError, "m.safetensors", "meta", "to_empty()"):
        load_checkpoint(small_model.to("meta"), tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "odd",
    [torch.zeros(5).to_sparse(), torch.zeros(5).to(torch.float8_e4m3fn), torch.tensor(0.0), torch.zeros(5).long()],
)
def test_odd_tensors_are_refused_by_name(odd, small_model, tmp_path):
    torch.save(small_model.state_dict() | {"head.bias": odd, "head.weight": torch.tensor(1.0)}, tmp_path / "x.pth")
    with raises(ValueError, "x.pth", "head.bias"):
        load_checkpoint(small_model, tmp_path / "x.pth")


def test_arguments_that_a_trainer_stored_beside_do_not_hinder(small_model, tmp_path):
    args = argparse.Namespace(lr=1e-3, model="hatnet")
    torch.save({"model": small_model.state_dict(), "args": args}, tmp_path / "x.pth")
    assert load_checkpoint(HATNet(**small_model.config), tmp_path / "x.pth") == []


def test_what_is_refused_is_named_without_advice_to_unpickle_it(small_model, tmp_path):
    torch.save({"model": small_model.state_dict(), "when": datetime.timedelta(1)}, tmp_path / "x.pth")
    with raises(ValueError, "x.pth", "datetime.timedelta") as error:
        load_checkpoint(small_model, tmp_path / "x.pth")
    assert "weights_only" not in str(error.value)


def test_a_file_without_a_state_dict_is_refused(small_model, tmp_path):
    endless = {}
    endless["model"] = endless
    for content in (endless, [torch.zeros(1)], {1: torch.zeros(1)}):
        torch.save(content, tmp_path / "x.pth")
        with raises(ValueError, tmp_path / "x.pth", "dict", "tensors"):
            load_checkpoint(small_model, tmp_path / "x.pth")


def test_a_name_that_would_not_load_again_is_not_saved_under(small_model, tmp_path):
    with raises(ValueError, "m.pth", ".safetensors"):
        save_checkpoint(small_model, tmp_path / "m.pth")
    assert list(tmp_path.iterdir()) == []


class Payload:
    def __reduce__(self):
        return (builtins.print, ("executed",))


def test_a_pickle_that_runs_code_is_refused_unexecuted(tmp_path, capsys):
    torch.save({"patch_embed.0.weight": Payload()}, tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("evil.pth", "plain.pth"):
        with raises(ValueError, tmp_path / name):
            load_checkpoint(create_model("hatnet_tiny"), tmp_path / name)
    assert "executed" not in capsys.readouterr().out


class Opens:
    """Counts how often a file is opened, by anybody, as the kernel reports it."""

    OPEN, CLOSE = 0x20, 0x18

    def __init__(self, path):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.queue = self.libc.inotify_init1(os.O_NONBLOCK)
        # closing is watched, too: two equal events in a row would be reported as one
        assert self.libc.inotify_add_watch(self.queue, os.fsencode(path), self.OPEN | self.CLOSE) >= 0

    def count(self):
        events = os.read(self.queue, 1 << 16)
        os.close(self.queue)
        masks = [struct.unpack_from("iI", events, i)[1] for i in range(0, len(events), 16)]  # a file's have no name
        return sum(bool(mask & self.OPEN) for mask in masks)


LOADS = {
    "load_model": load_model,
    "load_model of a folder": lambda path: load_model(path.parent),
    "load_checkpoint": lambda path: load_checkpoint(HATNet(**SMALL, num_classes=5), path),
    "read_metadata": read_metadata,
    "read_state": read_state,
}


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is a part of Linux")
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_file_is_opened_once_for_metadata_and_weights(load, small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(small_model, path)
    opens = Opens(path)
    load(path)
    assert opens.count() == 1


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is a part of Linux")
def test_a_checkpoint_that_was_read_is_not_opened_again(small_model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_checkpoint(small_model, path, {"classes": ["a", "b"]})
    opens = Opens(path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.metadata["classes"] == ["a", "b"]
    model, other = load_model(checkpoint), HATNet(**small_model.config)
    assert load_checkpoint(other, checkpoint) == []
    for p, q, r in zip(small_model.parameters(), model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
    assert opens.count() == 1


@pytest.fixture
def built(monkeypatch):
    """Arguments of every HAT-Net that is built."""
    models, init = [], HATNet.__init__
    monkeypatch.setattr(HATNet, "__init__", lambda self, *a, **k: (models.append(k), init(self, *a, **k))[1])
    return models


def test_loading_builds_one_model_and_a_refusal_none(small_model, tmp_path, built):
    save_checkpoint(small_model, tmp_path / "m.safetensors")
    built.clear()
    model = load_model(tmp_path / "m.safetensors")
    assert len(built) == 1
    model.reset_classifier(2)
    with raises(ValueError, "m.safetensors", "head.weight", (2, 24), (5, 24), "drop_head"):
        load_checkpoint(model, tmp_path / "m.safetensors")
    assert len(built) == 1


SHOWN = [*list_models(), "hatnet_small_window234", "hatnet_small_window34", "hatnet_small_window4"]
SHOWN += ["hatnet_small_no_depthwise"]


@pytest.mark.parametrize("name", SHOWN)
def test_a_refusal_names_the_model_that_the_shapes_show(name, tmp_path):
    with torch.device("meta"):
        own, state = (create_model(n, num_classes=7).state_dict() for n in ("hatnet_small_gelu", name))
    state.pop("stem.conv1.bias")  # what is damaged is still recognised
    with raises(ValueError, tmp_path, name, "hatnet_small", 7) as error:
        check_match(own, state, tmp_path, "take {}", "keep the head")
    assert (f"take {name}" in str(error.value)) == (name != "hatnet_small")  # GELU has the shapes of SiLU
    assert "keep the head" not in str(error.value)


@pytest.mark.parametrize("shape", [(), (3,), (0, 0, 1, 1), (8, 0, 1, 1)])
def test_shapes_that_no_model_has_are_described(shape, small_model, tmp_path):
    own = small_model.state_dict()
    state = own | {f"stages.{i}.blocks.0.mlp.expand.weight": torch.zeros(shape) for i in range(4)}
    with raises(ValueError, tmp_path, "stages.0.blocks.0.mlp.expand.weight", shape):
        check_match(own, state, tmp_path, "", "")
