"""Damaged and hostile files: every reader says in one line what is wrong, and runs nothing of them."""

import json
import pickle
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import newest, sign
from safetensors.torch import save as save_tensors

from hatnet_core import create_model, load_checkpoint, read_metadata, save_checkpoint
from hatnet_core.checkpoint.zero import checkpoint_folder
from hatnet_testing import check as check_message
from hatnet_testing import raises
from hatnet_train.data.shard_writer import write_shards
from hatnet_train.data.shards import Shards, read_index
from hatnet_train.deepspeed.user_json import fields_of, read_deepspeed_json
from hatnet_train.distributed.preflight import read_hostfile
from hatnet_train.run.checkpoint import MANIFEST, VERSION, check, commit, folder_name, read, read_manifest
from hatnet_train.run.folder import CONFIG, check_run, read_config
from hatnet_train.run.state import OPTIMIZER, STATE, WEIGHTS, read_saved
from image_folders import make_image_folder

RUNS = 1000
"""Inputs of each of the eleven readers."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw, content: bytes):
    """Draw a damaged file: changed, missing or additional bytes, nested too deep, another value."""
    kind = draw(st.sampled_from(["bytes", "cut", "more", "value", "other", "deep"]))
    if kind == "cut":
        return content[: draw(st.integers(0, len(content) - 1))]
    if kind == "more":
        return content + draw(st.binary(min_size=1, max_size=40))
    if kind == "other":
        return draw(st.binary(max_size=200)) if draw(st.booleans()) else json.dumps(draw(JSON)).encode()
    if kind == "deep":
        return b"[" * draw(st.integers(1, 200_000))
    if kind == "value" and content[:1] == b"{":
        return json.dumps(draw(changed(json.loads(content)))).encode()
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 5))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content)


@st.composite
def changed(draw, value):
    """The value with another one in some place of it."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    place = draw(st.sampled_from(places))
    return (dict if isinstance(value, dict) else list)(
        {**value, place: draw(changed(value[place]))}
        if isinstance(value, dict)
        else [*value[:place], draw(changed(value[place])), *value[place + 1 :]]
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a small model, as a run writes it."""
    model = create_model("hatnet_tiny", num_classes=2, embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), head_dim=8)
    state = {
        **{"step": 3, "rows": [], "skipped": [], "bad_images": 0, "trained": 1, "loss": 0.5, "lr": 0.1},
        **{"seconds": 1.0, "waited": 0.0, "config": {"seed": 1}, "data": {"training data": "3 images"}},
        "engine": {"global_steps": 3, "skipped_steps": 0, "scheduler_step": 3, "loss_scaling": {}},
        "optimizer": {"step": 3.0},
    }
    moments = {f"exp_avg/{name}": p.detach().clone() for name, p in model.named_parameters()}
    files = {
        WEIGHTS: lambda path: save_checkpoint(model, path, {"classes": ["a", "b"]}),
        OPTIMIZER: lambda path: write_tensors(moments, path),
        STATE: lambda path: path.write_text(json.dumps(state)),
    }
    folder = tmp_path_factory.mktemp("saved")
    return commit(folder, folder_name(3, evaluated=False), files, {"step": 3})


def write_tensors(tensors, path):
    """Write a safetensors file."""
    path.write_bytes(save_tensors(tensors))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards."""
    root = tmp_path_factory.mktemp("shards")
    make_image_folder(root / "images")
    write_shards(root / "images", root / "shards", shard_megabytes=0.03)
    return root / "shards"


def read_metadata_of(path):
    """Read metadata as every command does, from a file without weights."""
    weights = path.with_name("metadata.safetensors")
    header = path.read_bytes().decode("utf-8", "replace")
    weights.write_bytes(save_tensors({"a": torch.zeros(1)}, {"hatnet": header}))
    return read_metadata(weights)


def read_config_of_a_run(path):
    """As --verify and --resume read it."""
    return read_config(path), check_run(path.parent)


def read_signed(path):
    """As a run resumes, from a folder whose manifest lists what is in it."""
    sign(path.parent, path.name)
    return read_saved(path.parent)


READERS = {
    "manifest": (MANIFEST, lambda path: (list(check(path.parent)), list(read(path.parent)))),
    "state of a run": (STATE, read_signed),
    "weights": (WEIGHTS, read_metadata),
    "metadata of weights": ("metadata.json", read_metadata_of),
    "the newest of DeepSpeed's folders": ("latest", lambda path: checkpoint_folder(path.parent)),
    "moments": (OPTIMIZER, read_signed),
    "configuration of a run": (CONFIG, read_config_of_a_run),
    "DeepSpeed's configuration": ("ds.json", lambda path: fields_of(read_deepspeed_json(path))),
    "hostfile": ("hosts", read_hostfile),
}


def content_of(name, saved):
    """A good file for each reader."""
    if name == "ds.json":
        settings = {"train_batch_size": 64, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
        return json.dumps({**settings, "zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}).encode()
    if name == "hosts":
        return b"localhost slots=4\n# a comment\n127.0.0.1 slots=2\n"
    if name == CONFIG:
        return json.dumps({"config": {"seed": 1}, "versions": {"torch": "2"}, "resumed": [{"config": {}}]}).encode()
    if name == "latest":
        return b"global_step12"
    if name == "metadata.json":
        return json.dumps(read_metadata(saved / WEIGHTS)).encode()
    return (saved / name).read_bytes()


def assert_answers(read, path):
    """A value, or an error that is a line."""
    message = None
    try:
        read(path)
    except (ValueError, OSError) as error:
        message = str(error)
    if message is not None:
        assert path.name in message or str(path.parent) in message
        assert len(message) < 2000


@pytest.mark.parametrize("reader", READERS)
def test_readers_of_run_folders_answer_whatever_is_in_their_files(reader, saved, tmp_path):
    name, read = READERS[reader]
    folder = tmp_path / "step-0000000003"
    shutil.copytree(saved, folder)

    @settings(max_examples=RUNS, deadline=5000, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged(content_of(name, saved)))
    def check_all(content):
        nonlocal tried
        tried += 1
        (folder / name).write_bytes(content)
        assert_answers(read, folder / name)

    tried = 0
    check_all()
    assert tried >= RUNS


def test_the_reader_of_shards_answers_whatever_is_in_their_index(shards, tmp_path):
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)

    @settings(max_examples=RUNS, deadline=5000, suppress_health_check=list(HealthCheck), database=None)
    @given(damaged((shards / "index.json").read_bytes()))
    def check_all(content):
        nonlocal tried
        tried += 1
        (copy / "index.json").write_bytes(content)
        assert_answers(lambda path: (read_index(path.parent), Shards(path.parent, "train")), copy / "index.json")

    tried = 0
    check_all()
    assert tried >= RUNS


class Harm:
    """Payload that an attacker would have unpickled."""

    def __reduce__(self):
        """Makes a file where it is run."""
        return (open, ("harm", "w"))


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE, MANIFEST])
def test_nothing_in_a_checkpoint_is_unpickled(name, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "step-0000000003"
    shutil.copytree(saved, folder)
    for write in (lambda path: path.write_bytes(pickle.dumps(Harm())), lambda path: torch.save({"a": Harm()}, path)):
        write(folder / name)
        if name != MANIFEST:  # as whoever can write the one file can write the other
            sign(folder, name)
            assert list(check(folder)) == []
            with raises(ValueError, folder / name):
                read_saved(folder)
        else:
            assert newest(folder.parent)[0] is None
    if name == WEIGHTS:
        with raises(ValueError, folder / name, "safetensors"):
            load_checkpoint(create_model("hatnet_tiny"), folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "", "manifest.json", "a\\b", "a\0b"])
def test_a_manifest_does_not_lead_out_of_its_folder(name, tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "step-0000000001"
    folder.mkdir()
    entry = {"bytes": 1, "sha256": "2" * 64}
    (folder / MANIFEST).write_text(json.dumps({"version": VERSION, "files": {name: entry}}))
    with raises(ValueError, folder / MANIFEST, "files", repr(name)):
        read_manifest(folder)


def test_a_link_is_no_file_of_a_checkpoint(saved, tmp_path):
    folder = tmp_path / "step-0000000003"
    shutil.copytree(saved, folder)
    (folder / STATE).unlink()
    (folder / STATE).symlink_to(saved / STATE)
    (problem,) = check(folder)
    check_message(problem, folder / STATE, (saved / STATE).stat().st_size)


def test_a_header_that_claims_more_than_the_file_holds_is_refused(saved, tmp_path):
    folder = tmp_path / "step-0000000003"
    shutil.copytree(saved, folder)
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + content[8:])
    sign(folder, WEIGHTS)
    for reader, path in ((read_metadata, folder / WEIGHTS), (read_saved, folder)):
        with raises(ValueError, folder / WEIGHTS):
            reader(path)
