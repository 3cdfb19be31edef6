import dataclasses
import errno
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hatnet_testing import check, raises
from hatnet_train.data.folder import Folder
from hatnet_train.data.order import GlobalOrder
from hatnet_train.data.shard_writer import write_shards
from hatnet_train.data.shards import RECORD, Index, Shard, Shards, Split, verify
from image_folders import encoded

IMAGENET = 1_281_167


@pytest.fixture
def shards(made, tmp_path):
    """A copy of the shards to damage."""
    return shutil.copytree(made, tmp_path / "shards")


def test_held_out_images_read_from_shards_are_those_of_the_folder_in_its_order(images, made):
    found, expected = Shards(made, "val"), Folder(images / "val", ("ant", "bee", "odd"))
    assert len(list(made.glob("val-*.tar"))) > 1
    assert found.classes == expected.classes
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == expected.labels.tolist() == [0] * 6 + [2] * 8
    assert [found.encoded(i) for i in range(len(found))] == [expected.encoded(i) for i in range(len(expected))]
    assert all(torch.equal(found.image(i), expected.image(i)) for i in range(len(expected)))


def test_every_record_points_at_the_member_that_tarfile_finds(made):
    records = np.load(made / "train.index.npy")
    places = []
    for number, path in enumerate(sorted(made.glob("train-*.tar"))):
        with tarfile.open(path) as tar:
            members = [member for member in tar.getmembers() if not member.name.endswith(".cls")]
        places += [(number, member.offset_data, member.size) for member in members]
    assert [record.item()[:3] for record in records] == places


# --- processes, threads and descriptors


class Encoded(torch.utils.data.Dataset):
    """Image files with the worker that read them."""

    def __init__(self, shards):
        self.shards = shards

    def __len__(self):
        return 10 * len(self.shards)

    def __getitem__(self, i):
        time.sleep(0.001)  # so that no worker does all
        return self.shards.encoded(i % len(self.shards)), os.getpid()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # on machines of fewer cores
def test_forked_workers_of_a_loader_read_what_their_parent_reads(made):
    shards = Shards(made, "train")
    expected = [shards.encoded(i) for i in range(len(shards))]  # and descriptors are open when the workers fork
    loader = DataLoader(Encoded(shards), batch_size=None, num_workers=3, multiprocessing_context="fork")
    read, workers = zip(*loader, strict=True)
    assert list(read) == expected * 10
    assert len(set(workers)) == 3
    assert os.getpid() not in workers
    assert [shards.encoded(i) for i in range(len(shards))] == expected


def test_a_pickled_copy_is_small_and_reads_the_same(made):
    shards = Shards(made, "train", ("odd", "bee", "ant"))
    expected = [shards.encoded(i) for i in range(len(shards))]
    pickled = pickle.dumps(shards)
    copy = pickle.loads(pickled)
    assert len(pickled) < 3000
    assert [copy.encoded(i) for i in range(len(copy))] == expected
    assert copy.labels.tolist() == shards.labels.tolist()
    assert copy.digest() == shards.digest()


def open_tars(root):
    """Shards below ``root`` that this process has open."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.append(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return [path for path in found if path.is_relative_to(root) and path.suffix == ".tar"]


def test_few_shards_are_open_at_a_time_and_none_after_the_last_use(made, monkeypatch):
    monkeypatch.setattr("hatnet_train.data.shards.OPEN_SHARDS", 3)
    shards = Shards(made, "train")
    assert len(list(made.glob("train-*.tar"))) > 3
    assert open_tars(made) == []
    seen = set()
    for i in range(len(shards)):
        shards.encoded(i)
        seen.update(open_tars(made))
        assert 1 <= len(open_tars(made)) <= 3
    assert len(seen) == len(list(made.glob("train-*.tar")))
    del shards
    assert open_tars(made) == []


def test_threads_read_the_right_bytes_while_others_close_shards(made, monkeypatch):
    monkeypatch.setattr("hatnet_train.data.shards.OPEN_SHARDS", 1)
    shards = Shards(made, "train")
    expected = [shards.encoded(i) for i in range(len(shards))]
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, len(shards), 500):
            if shards.encoded(i) != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_1024_ranks_together_read_every_image_once(tmp_path):
    (tmp_path / "train" / "class").mkdir(parents=True)
    for i in range(2048):
        content = encoded(Image.new("RGB", (1, 1), (i % 256, i // 256, 0)), "BMP")
        (tmp_path / "train" / "class" / f"{i}.bmp").write_bytes(content)
    write_shards(tmp_path, tmp_path / "shards", splits=("train",), shard_megabytes=0.1)
    shards = Shards(tmp_path / "shards", "train")
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 20
    order = GlobalOrder(length=2048, batch_size=1024, seed=0).epoch(0).reshape(-1, 1024)
    by_rank = [[shards.encoded(i) for i in order[:, rank]] for rank in range(1024)]
    assert len({content for contents in by_rank for content in contents}) == 2048 == sum(map(len, by_rank))


# --- at the size of ImageNet


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Index and records of 1.28 million images over empty tar files that take no space."""
    root = tmp_path_factory.mktemp("imagenet")
    records = np.zeros(IMAGENET, RECORD)
    records["size"] = np.random.default_rng(0).integers(60_000, 160_000, IMAGENET)
    records["label"] = np.arange(IMAGENET) % 1000
    shards = []
    for number, part in enumerate(np.array_split(records, 560)):
        part["shard"] = number
        ends = np.cumsum(3 * 512 + -(-part["size"].astype(np.int64) // 512) * 512)
        part["offset"][0], part["offset"][1:] = 512, ends[:-1] + 512
        shards.append(Shard(f"train-{number:06d}.tar", int(ends[-1]) + 10240, "0" * 64, len(part)))
        (root / shards[-1].file).touch()
        os.truncate(root / shards[-1].file, shards[-1].bytes)
    np.save(root / "train.index.npy", records)
    splits = {"train": Split(IMAGENET, "0" * 64, tuple(shards))}
    index = Index(tuple(f"n{i:08d}" for i in range(1000)), {"resize": None}, splits)
    content = {"format": "hatnet-shards", "version": 1, **dataclasses.asdict(index)}
    (root / "index.json").write_text(json.dumps(content))
    return root


MEASURE = """
import json, sys, time
from pathlib import Path
from hatnet_train.data.shards import Shards

def memory(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024

before = memory("VmRSS")
start = time.perf_counter()
shards = Shards(Path(sys.argv[1]), "train")
seconds = time.perf_counter() - start
print(json.dumps([len(shards), seconds, memory("VmHWM") - before]))
"""


def test_imagenet_opens_at_once_and_takes_little_memory(imagenet, run_command):
    done = run_command(sys.executable, "-c", MEASURE, imagenet)
    assert done.returncode == 0, done.stderr
    images, seconds, megabytes = json.loads(done.stdout)
    assert images == IMAGENET
    assert seconds < 1
    assert megabytes < 64


@pytest.mark.parametrize("rank", [0, 1023])
def test_a_rank_of_1024_reads_its_share_of_imagenet_in_its_order(imagenet, rank):
    order = GlobalOrder(length=IMAGENET, batch_size=4096, seed=0).epoch(5).reshape(-1, 1024, 4)
    share = order[:, rank].ravel()
    records = np.load(imagenet / "train.index.npy")
    for i in share:
        with (imagenet / f"train-{records[i]['shard']:06d}.tar").open("r+b") as file:
            file.seek(int(records[i]["offset"]))
            file.write(int(i + 1).to_bytes(8, "little"))  # where there is nothing else but zeros
    shards = Shards(imagenet, "train")
    start = time.perf_counter()
    assert all(int.from_bytes(shards.encoded(i)[:8], "little") == i + 1 for i in share)
    assert time.perf_counter() - start < 5
    assert len(set(share.tolist())) == len(share) == IMAGENET // 4096 * 4
    assert len(open_tars(imagenet)) <= 256


# --- bad shards


def edit_index(root, change):
    content = json.loads((root / "index.json").read_text())
    change(content)
    (root / "index.json").write_text(json.dumps(content))


def edit_records(root, change):
    records = np.load(root / "train.index.npy")
    np.save(root / "train.index.npy", change(records))


def archive(records):
    buffer = io.BytesIO()
    np.savez(buffer, records=records)
    return buffer.getvalue()


def set_record(i, **values):
    def change(records):
        for name, value in values.items():
            records[name][i] = value
        return records

    return lambda root: edit_records(root, change)


def set_shard(number, **values):
    return lambda root: edit_index(root, lambda index: index["splits"]["train"]["shards"][number].update(values))


def set_index(**values):
    return lambda root: edit_index(root, lambda index: index.update(values))


BAD_FILES = {
    "no index": (lambda root: (root / "index.json").unlink(), FileNotFoundError, ["index.json"]),
    "not JSON": (lambda root: (root / "index.json").write_bytes(b"\xff{"), ValueError, ["index.json", "JSON"]),
    "half the JSON": (lambda root: os.truncate(root / "index.json", 99), ValueError, ["index.json", "JSON"]),
    "not ours": (set_index(format="tar"), ValueError, ["index.json", "format", "'tar'", "hatnet-shards"]),
    "a list": (
        lambda root: (root / "index.json").write_text("[]"),
        ValueError,
        ["index.json", "format", None, "hatnet-shards"],
    ),
    "newer": (set_index(version=2), ValueError, ["index.json", "version", 2, 1]),
    "no classes": (set_index(classes=[]), ValueError, ["index.json", "classes", []]),
    "twins": (set_index(classes=["a", "a"]), ValueError, ["index.json", "classes", ["a", "a"]]),
    "numbers": (set_index(classes=[1, 2]), ValueError, ["index.json", "classes[0]", 1]),
    "no splits": (set_index(splits=[1]), ValueError, ["index.json", "splits", [1]]),
    "odd split": (set_index(splits={"../a": {}}), ValueError, ["index.json", 'splits["../a"]']),
    "bad split": (set_index(splits={"train": 7}), ValueError, ["index.json", 'splits["train"]', 7]),
    "wrong count": (
        lambda root: edit_index(root, lambda index: index["splits"]["train"].update(images=21)),
        ValueError,
        ["index.json", "images", 21, 20],
    ),
    "negative": (set_shard(0, bytes=-1), ValueError, ["index.json", 'splits["train"].shards[0].bytes', -1]),
    "no hash": (set_shard(1, sha256="0"), ValueError, ["index.json", 'splits["train"].shards[1].sha256', "'0'"]),
    "above": (set_shard(1, file="../train-000001.tar"), ValueError, ["index.json", "file", "'../train-000001.tar'"]),
    "absolute": (set_shard(1, file="/etc/train.tar"), ValueError, ["index.json", "file", "'/etc/train.tar'"]),
    "inside": (set_shard(1, file="a/b.tar"), ValueError, ["index.json", "file", "'a/b.tar'"]),
    "Windows": (set_shard(1, file="..\\b.tar"), ValueError, ["index.json", "file", repr("..\\b.tar")]),
    "itself": (set_shard(1, file=".."), ValueError, ["index.json", "file", "'..'"]),
    "missing shard": (lambda root: (root / "train-000001.tar").unlink(), FileNotFoundError, ["train-000001.tar"]),
    "cut shard": (
        lambda root: os.truncate(root / "train-000001.tar", 5000),
        ValueError,
        ["train-000001.tar", 5000],
    ),
}


def change_records(change):
    """A change of the file of records: its error names that file and what else is given."""
    return lambda root: change(root / "train.index.npy")


BAD_RECORDS = {
    "no records": (change_records(Path.unlink), FileNotFoundError, [20]),
    "cut records": (change_records(lambda path: os.truncate(path, 200)), ValueError, [20]),
    "empty records": (change_records(lambda path: os.truncate(path, 0)), ValueError, [20]),
    "pickled records": (change_records(lambda path: np.save(path, np.array([{}]))), ValueError, [20]),
    "an archive": (
        change_records(lambda path: path.write_bytes(archive(np.zeros(20, RECORD)))),
        ValueError,
        ["magic string", 20],
    ),
    "numbers": (change_records(lambda path: np.save(path, np.zeros(20))), ValueError, ["float64", RECORD]),
    "too few": (lambda root: edit_records(root, lambda records: records[:-1]), ValueError, [(19,), (20,)]),
    "in no shard": (set_record(3, shard=99), ValueError, ["record 3", "shard 99"]),
    "in the first header": (set_record(3, offset=100), ValueError, ["record 3", "offset 100"]),
    "past the end": (set_record(3, offset=2**40), ValueError, ["record 3", "offset 1099511627776"]),
    "around the end": (set_record(3, size=2**31), ValueError, ["record 3", "size 2147483648"]),
    "far out": (set_record(3, offset=2**64 - 1, size=2), ValueError, ["record 3", "size 2"]),
    "empty": (set_record(3, size=0), ValueError, ["record 3", "size 0"]),
    "of no class": (set_record(3, label=3), ValueError, ["record 3", "label 3"]),
    "in another shard": (
        set_record(slice(None), shard=0, offset=512, size=9),
        ValueError,
        ["train-000000.tar", 20, 5],
    ),
}


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        *(pytest.param(*case, id=name) for name, case in BAD_FILES.items()),
        *(pytest.param(*case[:2], ["train.index.npy", *case[2]], id=name) for name, case in BAD_RECORDS.items()),
    ],
)
def test_damaged_shards_are_refused_in_a_line_that_names_file_and_value(shards, damage, error, named):
    damage(shards)
    with raises(error, shards, *named) as caught:
        Shards(shards, "train")
    assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there_is_refused(shards):
    with raises(FileNotFoundError, shards, "test", "train", "val"):
        Shards(shards, "test")


def test_classes_that_training_did_not_have_are_refused_and_others_find_their_places(shards):
    with raises(ValueError, shards, "ant", "odd"):
        Shards(shards, "val", ["bee", "wasp"])
    own, given_ = Shards(shards, "val"), Shards(shards, "val", ["wasp", "odd", "bee", "ant"])
    assert [given_.classes[label] for label in given_.labels] == [own.classes[label] for label in own.labels]
    assert given_.digest() != own.digest()


def test_the_digest_is_that_of_any_copy_and_of_no_other_shards(made, shards, images, tmp_path):
    write_shards(images, tmp_path / "resized", resize=70)
    assert Shards(shards, "train").digest() == Shards(made, "train").digest()
    digests = {Shards(root, split).digest() for root in (made, tmp_path / "resized") for split in ("train", "val")}
    assert len(digests) == 4


@pytest.mark.parametrize(("name", "place"), [("val-000001.tar", -1), ("train.index.npy", -8)])
def test_verify_names_the_first_file_that_is_not_as_it_was_written(shards, name, place):
    verify(shards)
    content = bytearray((shards / name).read_bytes())
    content[place] ^= 1  # of the records, the size of the last image: it still is inside its shard
    (shards / name).write_bytes(content)
    with raises(ValueError, shards / name, "SHA-256"):
        verify(shards, progress=False)


def test_a_damaged_image_is_named_by_its_shard_and_key(shards):
    record = np.load(shards / "val.index.npy")[8]
    with (shards / f"val-{record['shard']:06d}.tar").open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(b"not an image")
    with raises(ValueError, shards / f"val-{record['shard']:06d}.tar", "odd/named_wrongly.png"):
        Shards(shards, "val").image(8)


def test_a_shard_that_goes_or_shrinks_while_it_is_in_use_is_named(shards):
    opened = Shards(shards, "train")
    (shards / "train-000000.tar").unlink()
    with raises(ValueError, shards / "train-000000.tar", os.strerror(errno.ENOENT)):
        opened.image(0)
    check(opened.name(0), shards / "train-000000.tar", 512)
    os.truncate(shards / "train-000001.tar", 600)
    second = int(np.flatnonzero(np.load(shards / "train.index.npy")["shard"])[0])
    with raises(ValueError, f"image {second}", shards / "train-000001.tar", 88, 512):
        opened.image(second)
