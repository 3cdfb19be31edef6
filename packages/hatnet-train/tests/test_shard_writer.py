import contextlib
import errno
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from hatnet_testing import check, error_line, raises
from hatnet_train.data.folder import Folder
from hatnet_train.data.images import decode, to_pillow
from hatnet_train.data.shard_writer import write_shards
from hatnet_train.data.shards import Shards
from image_folders import encoded, image_of, picture, read_with_webdataset
from launches import BIN


@pytest.fixture(scope="module")
def resized(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("resized") / "shards"
    write_shards(images, out, resize=70, quality=95)
    return out


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An image folder that takes a process some seconds to resize."""
    folder = tmp_path_factory.mktemp("many") / "train" / "class"
    folder.mkdir(parents=True)
    picture(0, 1000, 800).save(folder / "0.jpg")
    for i in range(1, 800):
        (folder / f"{i}.jpg").hardlink_to(folder / "0.jpg")
    return folder.parents[1]


def files_below(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def leftovers(out):
    """Return the names in the folder of ``out`` that begin with its name."""
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(out.name))


def test_training_images_are_all_in_the_shards_in_an_order_that_the_seed_decides(images, made, tmp_path):
    found, folder = Shards(made, "train"), Folder(images / "train")
    expected = [(folder.encoded(i), folder.labels[i]) for i in range(len(folder))]
    in_shards = [(found.encoded(i), found.labels[i]) for i in range(len(found))]
    assert sorted(in_shards) == sorted(expected)
    assert in_shards != expected
    write_shards(images, tmp_path / "other", shard_megabytes=0.03, seed=1)
    other = Shards(tmp_path / "other", "train")
    assert found.labels.tolist() != other.labels.tolist()
    assert sorted(in_shards) == sorted((other.encoded(i), other.labels[i]) for i in range(len(other)))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_webdataset_library_reads_the_same_images_and_labels(made, split):
    found, samples = Shards(made, split), read_with_webdataset(made, split)
    assert len({sample["__key__"] for sample in samples}) == len(samples) == len(found)
    assert [image_of(sample) for sample in samples] == [found.encoded(i) for i in range(len(found))]
    assert [int(sample["cls"]) for sample in samples] == found.labels.tolist()


def test_keys_are_made_of_class_and_file_name_and_endings_tell_the_real_format(made):
    names = [Shards(made, "val").name(i).removeprefix(str(made) + os.sep) for i in range(14)]
    assert names[0] == "val-000000.tar: ant/ant_0.jpg"
    assert [name.partition(": ")[2] for name in names[6:]] == [
        "odd/cmyk.jpg",
        "odd/grey.jpg",
        "odd/named_wrongly.png",
        "odd/palette.png",
        "odd/picture.bmp",
        "odd/picture-2.tif",
        "odd/picture-3.webp",
        "odd/transparent.png",
    ]


def test_shards_of_a_split_differ_by_at_most_one_image_and_none_is_much_larger_than_asked_for(made):
    shards = json.loads((made / "index.json").read_text())["splits"]["train"]["shards"]
    counts = [shard["images"] for shard in shards]
    assert sum(counts) == 20
    assert max(counts) - min(counts) <= 1
    assert max(shard["bytes"] for shard in shards) < 60_000


def test_any_number_of_workers_writes_the_same_bytes(images, tmp_path):
    for workers in (0, 2):
        write_shards(images, tmp_path / str(workers), shard_megabytes=0.03, resize=64, workers=workers)
    alone = files_below(tmp_path / "0")
    assert len(alone) > 6
    assert files_below(tmp_path / "2") == alone


# --- odd names

stems = st.sampled_from(["a", "a.b", "a b", "a-2", "a_b", "__a__", "x" * 200]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=40
).filter(lambda name: not name.startswith("."))
files = st.lists(st.tuples(stems, st.sampled_from([".jpg", ".JPEG", ".png"])), min_size=1, max_size=5, unique=True)


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(stems, files, min_size=1, max_size=3).filter(
        lambda classes: (
            len({unicodedata.normalize("NFC", name).strip().casefold() for name in classes}) == len(classes)
        )
    )
)
@example({"a b": [("a", ".png")], "a_b": [("a", ".png")]})
def test_files_of_any_name_get_keys_of_their_own(classes):
    expected = set()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for label, name in enumerate(sorted(classes)):
            (root / "train" / name).mkdir(parents=True)
            for stem, ending in classes[name]:
                content = encoded(Image.new("RGB", (2, 2), (label, len(expected), 0)), "PNG")
                (root / "train" / name / (stem + ending)).write_bytes(content)
                expected.add((content, label))
        write_shards(root, root / "shards", splits=("train",))
        samples, found = read_with_webdataset(root / "shards", "train"), Shards(root / "shards", "train")
        assert {(found.encoded(i), int(found.labels[i])) for i in range(len(found))} == expected
    assert len(samples) == len(expected)
    assert {(sample["png"], int(sample["cls"])) for sample in samples} == expected
    assert all(re.fullmatch(r"[\w-]+/[\w-]+", sample["__key__"]) for sample in samples)
    assert len({(sample["__key__"].split("/")[0], sample["cls"]) for sample in samples}) == len(classes)


def test_names_that_are_not_utf8_and_folders_inside_a_class_are_no_obstacle(tmp_path):
    folder = tmp_path / "train" / os.fsdecode(b"gar\xe7on")
    (folder / "inner").mkdir(parents=True)
    content = encoded(picture(0, 40, 40))
    for name in (b"\xff.jpg", b"inner/b.jpg"):
        (folder / os.fsdecode(name)).write_bytes(content)
    write_shards(tmp_path, tmp_path / "shards", splits=("train",))
    shards = Shards(tmp_path / "shards", "train", [os.fsdecode(b"gar\xe7on")])
    assert sorted(shards.name(i).partition(": ")[2] for i in range(2)) == ["gar_on/inner_b.jpg", "gar_on/unnamed.jpg"]
    assert shards.digest()


# --- resizing


def test_larger_images_get_the_short_side_and_keep_their_shape(tmp_path):
    sizes = [(300, 100), (100, 301), (71, 71), (2000, 70), (64, 500)]
    for i, size in enumerate(sizes):
        (tmp_path / "val" / "class").mkdir(parents=True, exist_ok=True)
        picture(i, *size).save(tmp_path / "val" / "class" / f"{i}.jpg")
    write_shards(tmp_path, tmp_path / "shards", splits=("val",), resize=70)
    found = Shards(tmp_path / "shards", "val")
    shapes = [tuple(found.image(i).shape) for i in range(len(sizes))]
    assert shapes == [(3, 70, 210), (3, 211, 70), (3, 70, 70), (3, 70, 2000), (3, 500, 64)]


def test_resized_images_are_close_to_those_that_pillow_resizes(images, resized):
    found, folder = Shards(resized, "val"), Folder(images / "val", ("ant", "bee", "odd"))
    compared = 0
    for i in range(len(found)):
        original = to_pillow(folder.image(i))
        height, width = found.image(i).shape[-2:]
        if (width, height) != original.size:
            expected = np.asarray(original.resize((width, height), Image.BICUBIC)).astype(int)
            assert np.abs(found.image(i).permute(1, 2, 0).numpy() - expected).mean() < 3
            compared += 1
    assert compared == 6


def test_small_jpeg_files_stay_as_they_are_and_all_others_become_jpeg(images, resized):
    found, folder = Shards(resized, "val"), Folder(images / "val", ("ant", "bee", "odd"))
    same = [found.encoded(i) == folder.encoded(i) for i in range(len(found))]
    assert same == [False] * 6 + [True, True] + [False] * 6
    made = [Image.open(io.BytesIO(found.encoded(i))) for i, kept in enumerate(same) if not kept]
    assert {image.format for image in made} == {"JPEG"}
    assert {JpegImagePlugin.get_sampling(image) for image in made} == {2}  # 4:2:0
    assert all(found.image(i).shape == folder.image(i).shape for i in range(6, 14))


@pytest.mark.parametrize("resize", [None, 64, 32], ids=["as it is", "small enough", "made smaller"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_an_image_that_exif_turns_is_turned_once(tmp_path, kind, resize):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    stored = np.zeros((48, 96, 3), np.uint8)
    stored[:, :48] = 255, 0, 0  # the left half, the upper one when turned
    (tmp_path / "val" / "class").mkdir(parents=True)
    Image.fromarray(stored).save(tmp_path / "val" / "class" / "image.x.jpg", kind, quality=95, exif=exif)
    write_shards(tmp_path, tmp_path / "shards", splits=("val",), resize=resize)
    image = Shards(tmp_path / "shards", "val").image(0)
    assert tuple(image.shape) == ((3, 64, 32) if resize == 32 else (3, 96, 48))
    half = image.shape[1] // 2
    assert image[0, : half - 8].min() > 200
    assert image[0, half + 8 :].max() < 55


def test_quality_decides_on_the_bytes_and_the_index_tells_how_they_were_made(images, resized, made, tmp_path):
    low = write_shards(images, tmp_path / "low", resize=70, quality=30, seed=3)
    assert low == json.loads((tmp_path / "low" / "index.json").read_text())
    assert low["made"] == {"resize": 70, "quality": 30, "seed": 3}
    assert len(Shards(tmp_path / "low", "val").encoded(0)) < len(Shards(resized, "val").encoded(0)) / 2
    assert json.loads((made / "index.json").read_text())["made"] == {"resize": None, "quality": None, "seed": 0}


# --- writing that cannot be done


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"resize": 31}, ["resize", 31, 32]),
        ({"quality": 0}, ["quality", 0, 1, 100]),
        ({"quality": 101}, ["quality", 101, 1, 100]),
        ({"shard_megabytes": 0}, ["shard_megabytes", 0]),
        ({"shard_megabytes": float("nan")}, ["shard_megabytes", "nan"]),
        ({"workers": -1}, ["workers", -1]),
        ({"seed": -1}, ["seed", -1]),
        ({"splits": ()}, ["splits"]),
        ({"splits": ("val", "val")}, ["splits", "val, val"]),
        ({"splits": ("../val",)}, ["split", "'../val'"]),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_work(tmp_path, arguments, named):
    with raises(ValueError, *named):
        write_shards(tmp_path / "missing", tmp_path / "out", **arguments)
    assert leftovers(tmp_path / "out") == []


def test_an_out_folder_that_is_taken_is_refused_and_not_changed(images, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("folder", "file"):
        with raises(ValueError, tmp_path / name):
            write_shards(images, tmp_path / name)
    assert files_below(tmp_path) == {Path("folder/notes"): b"mine", Path("file"): b"mine"}
    with raises(ValueError, "/", "mount point"):
        write_shards(images, Path("/"))


def test_an_empty_folder_and_a_link_to_one_are_filled(images, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    write_shards(images, tmp_path / "link", splits=("val",))
    assert len(Shards(tmp_path / "empty", "val")) == 14
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_a_folder_without_the_split_or_with_an_empty_class_is_refused_before_any_work(images, tmp_path):
    with raises(FileNotFoundError, images, "test/"):
        write_shards(images, tmp_path / "out", splits=("train", "test"))
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "wasp").mkdir()
    with raises(ValueError, tmp_path / "images" / "train" / "wasp"):
        write_shards(tmp_path / "images", tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


PLAIN = encoded(picture(0, 60, 60))
# and the number of their bytes, or a word of Pillow's
BAD_IMAGES = {
    "text": (b"no image at all", "15"),
    "empty": (b"", "0"),
    "half a JPEG": (PLAIN[:-200], "truncated"),
    "a JPEG header": (PLAIN[:300], "Truncated"),
    "half a PNG": (encoded(picture(0, 60, 60), "PNG")[:3000], ""),
    "half a BMP": (encoded(picture(0, 60, 60), "BMP")[:3000], "truncated"),
}


@pytest.mark.parametrize("resize", [None, 32])
@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_an_image_that_cannot_be_read_stops_the_work_and_is_named(tmp_path, kind, resize):
    content, named = BAD_IMAGES[kind]
    (tmp_path / "train" / "class").mkdir(parents=True)
    (tmp_path / "train" / "class" / "good.jpg").write_bytes(PLAIN)
    (tmp_path / "train" / "class" / "bad.jpg").write_bytes(content)
    with raises(ValueError, tmp_path / "train" / "class" / "bad.jpg", named):
        write_shards(tmp_path, tmp_path / "out", splits=("train",), resize=resize)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_skipped_and_reported_if_asked_for(images, tmp_path, workers):
    shutil.copytree(images, tmp_path / "images")
    bad = [tmp_path / "images" / name for name in ("train/ant/ant_2.JPEG", "val/odd/palette.png", "val/odd/new.jpg")]
    for path in bad:
        path.write_bytes(b"no image")
    problems = []
    out = tmp_path / "out"
    index = write_shards(tmp_path / "images", out, shard_megabytes=0.03, workers=workers, on_bad=problems.append)
    assert sorted(str(path) in problem for path in bad for problem in problems) == [False] * 6 + [True] * 3
    for split in ("train", "val"):
        shards = Shards(out, split)
        assert len(shards) == index["splits"][split]["images"] == {"train": 19, "val": 13}[split]
        assert [image_of(sample) for sample in read_with_webdataset(out, split)] == [
            shards.encoded(i) for i in range(len(shards))
        ]
        assert all(shards.image(i).shape[0] == 3 for i in range(len(shards)))


def test_a_split_none_of_whose_images_can_be_read_is_refused(tmp_path):
    (tmp_path / "train" / "class").mkdir(parents=True)
    (tmp_path / "train" / "class" / "bad.jpg").write_bytes(b"no image")
    with raises(ValueError, "train"):
        write_shards(tmp_path, tmp_path / "out", splits=("train",), on_bad=lambda problem: None)
    assert leftovers(tmp_path / "out") == []


def test_too_few_file_descriptors_end_the_command_with_remedies(images, run_command, tmp_path):
    line = f"ulimit -n 12; exec {BIN / 'hatnet-shards'} {images} --out {tmp_path / 'out'} --workers 4"
    done = run_command("bash", "-c", line)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    error_line(done.stderr, "hatnet-shards", 12, "ulimit -n", "--workers")
    assert leftovers(tmp_path / "out") == []


def test_jpeg_files_with_padding_or_rubbish_after_their_end_are_taken_as_they_are(tmp_path):
    contents = [PLAIN, PLAIN + bytes(5), PLAIN + b"rubbish"]
    (tmp_path / "val" / "class").mkdir(parents=True)
    for i, content in enumerate(contents):
        (tmp_path / "val" / "class" / f"{i}.jpg").write_bytes(content)
    write_shards(tmp_path, tmp_path / "out", splits=("val",))
    found = Shards(tmp_path / "out", "val")
    assert [found.encoded(i) for i in range(3)] == contents
    assert all(torch.equal(found.image(i), decode(PLAIN, "")) for i in range(3))


def test_an_image_that_a_worker_cannot_read_stops_all_of_them(many, tmp_path):
    shutil.copytree(many, tmp_path / "many")
    (tmp_path / "many" / "train" / "class" / "500.jpg").write_text("no image")
    start = time.perf_counter()
    with raises(ValueError, tmp_path / "many" / "train" / "class" / "500.jpg"):
        write_shards(tmp_path / "many", tmp_path / "out", splits=("train",), shard_megabytes=0.1, workers=2)
    assert time.perf_counter() - start < 60
    assert multiprocessing.active_children() == []
    assert leftovers(tmp_path / "out") == []


def test_a_full_disk_is_told_with_the_path_and_nothing_is_left(images, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))  # as good as a full disk: writing more fails
    try:
        with raises(OSError, tmp_path / "out.tmp", "train-000000.tar", os.strerror(errno.EFBIG)):
            write_shards(images, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert leftovers(tmp_path / "out") == []


def test_a_worker_that_is_killed_ends_the_work_with_a_reason(many, tmp_path):
    def kill():
        while not (children := multiprocessing.active_children()) or not list(tmp_path.glob("out.tmp-*/*.tar")):
            time.sleep(0.01)
        os.kill(children[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with raises(ChildProcessError, "killed", "workers"):
        write_shards(many, tmp_path / "out", splits=("train",), resize=64, shard_megabytes=0.1, workers=1)
    killer.join(60)
    assert leftovers(tmp_path / "out") == []


WRITE = """
import signal
import sys
from pathlib import Path
from hatnet_train.data.shard_writer import write_shards

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is not set if the tests run in the background
try:
    write_shards(Path(sys.argv[1]), Path(sys.argv[2]), splits=("train",), resize=64, shard_megabytes=0.1, workers=1)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_in_the_middle_leaves_no_shards_and_no_workers(many, tmp_path, number, status):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, many, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out.tmp-*/train-000001.tar")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)  # as a terminal does
        _, err = process.communicate(timeout=60)  # its end comes when the last of the processes has closed the pipe
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status
    assert not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert leftovers(tmp_path / "out") == []
        assert "Traceback" not in err


def fork_server_of(pid):
    """Return whether the process has started its fork server."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if b"multiprocessing.forkserver" in Path(f"/proc/{child}/cmdline").read_bytes():
                return True
    return False


def test_ctrl_c_while_the_workers_start_is_one_line(images, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not to be ignored, as in the background
    try:
        process = subprocess.Popen(
            [BIN / "hatnet-shards", images, "--out", tmp_path / "out", "--workers", "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 120
        while not fork_server_of(process.pid):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=60)  # its end comes when the last of the processes has closed the pipe
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out, err.count("\n")) == (130, "", 1)
    check(err, "hatnet-shards")
    assert leftovers(tmp_path / "out") == []
