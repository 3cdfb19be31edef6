import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from hatnet_train.data import Digits, evaluation_batches, preprocess, read_image, shift, train_batches
from hatnet_train.sampler import GlobalOrder


@pytest.fixture(scope="module")
def training():
    return Digits(train=True, size=32)


@pytest.fixture(scope="module")
def held_out():
    return Digits(train=False, size=32)


def test_every_digit_is_in_one_part_of_the_split_and_360_are_held_out(training, held_out):
    assert (len(training), len(held_out)) == (1437, 360)
    scans, labels = training.scans + held_out.scans, torch.cat([training.labels, held_out.labels]).tolist()
    everything = sorted((np.asarray(scan).tobytes(), label) for scan, label in zip(scans, labels, strict=True))
    source = load_digits()
    pixels = (source.images * 255 / 16).round().astype(np.uint8)
    assert everything == sorted((p.tobytes(), int(y)) for p, y in zip(pixels, source.target, strict=True))


def test_the_split_has_the_class_shares_of_the_whole_and_is_always_the_same(held_out):
    shares = torch.bincount(held_out.labels) / 360
    expected = np.bincount(load_digits().target) / 1797
    assert np.abs(shares.numpy() - expected).max() < 1 / 360
    assert torch.equal(Digits(train=False, size=32).labels, held_out.labels)


def test_images_are_the_scans_enlarged_and_normalised(held_out):
    assert held_out[7].shape == (3, 32, 32)
    assert held_out[7].min() >= -1
    assert held_out[7].max() <= 1
    grey = np.asarray(held_out.scans[7], dtype=np.float32)
    assert held_out[7].mean().item() == pytest.approx(grey.mean() / 127.5 - 1, abs=0.05)


@settings(max_examples=20, deadline=None)
@given(world_size=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 1000), epoch=st.integers(0, 300))
def test_the_ranks_together_see_the_batches_of_one_process_in_the_same_order(training, world_size, seed, epoch):
    def first_batches(rank, world_size):
        order = GlobalOrder(length=len(training), batch_size=48, seed=seed)
        batches = train_batches(training, order, epoch=epoch, max_shift=2, rank=rank, world_size=world_size)
        return [next(batches) for _ in range(3)]

    alone = first_batches(0, 1)
    ranks = [first_batches(rank, world_size) for rank in range(world_size)]
    for batch, parts in zip(alone, zip(*ranks, strict=True), strict=True):
        assert torch.equal(batch[0], torch.cat([images for images, _ in parts]))
        assert torch.equal(batch[1], torch.cat([labels for _, labels in parts]))


def test_an_epoch_sees_no_image_twice_and_leaves_out_less_than_a_batch(training):
    order = GlobalOrder(length=len(training), batch_size=100, seed=0)
    batches = list(train_batches(training, order, epoch=0, max_shift=0, rank=0, world_size=1))
    seen = torch.cat([images for images, _ in batches])
    assert len(batches) == 14
    images = [training[i] for i in range(len(training))]
    distinct = len(torch.unique(torch.stack(images).flatten(1), dim=0))
    assert len(torch.unique(seen.flatten(1), dim=0)) >= distinct - 37
    label_of = dict(zip((i.numpy().tobytes() for i in images), training.labels.tolist(), strict=True))
    labels = torch.cat([labels for _, labels in batches]).tolist()
    assert labels == [label_of[image.numpy().tobytes()] for image in seen]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_counts_every_image_exactly_once(held_out, world_size):
    counts = {}
    for rank in range(world_size):
        for images, labels in evaluation_batches(held_out, batch_size=50, rank=rank, world_size=world_size):
            assert len(images) == len(labels) <= 50
            for image, label in zip(images, labels.tolist(), strict=True):
                key = (image.numpy().tobytes(), label)
                counts[key] = counts.get(key, 0) + 1
    expected = {}
    for i, label in enumerate(held_out.labels.tolist()):
        key = (held_out[i].numpy().tobytes(), label)
        expected[key] = expected.get(key, 0) + 1
    assert counts == expected


@given(rows=st.integers(-5, 5), columns=st.integers(-5, 5))
def test_shift_is_a_roll_with_black_where_it_wraps(rows, columns):
    image = torch.rand(3, 6, 7)
    expected = torch.full((3, 6, 7), -1.0)
    for r in range(6):
        for c in range(7):
            if 0 <= r - rows < 6 and 0 <= c - columns < 7:
                expected[:, r, c] = image[:, r - rows, c - columns]
    assert torch.equal(shift(image, rows, columns), expected)


def test_preprocess_keeps_the_centre_of_a_wide_picture():
    picture = Image.new("RGB", (90, 30), (0, 0, 0))
    picture.paste((255, 255, 255), (30, 0, 60, 30))
    tensor = preprocess(picture, 60)
    assert tensor.shape == (3, 60, 60)
    assert tensor.dtype == torch.float32
    assert (tensor[:, :, 2:-2] == 1).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
def test_images_of_every_mode_are_read_as_rgb(mode, tmp_path):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (9, 5)).save(path)
    assert preprocess(read_image(path), 32).shape == (3, 32, 32)


def test_16_bit_grey_is_scaled_to_8_bits(tmp_path):
    Image.fromarray(np.full((4, 4), 0x7F80, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").getpixel((0, 0)) == (0x7F, 0x7F, 0x7F)


def test_a_missing_or_unreadable_image_is_refused_by_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no image at {tmp_path / 'none.png'}")):
        read_image(tmp_path / "none.png")
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(good)
    for name, content in {"text.png": b"no image", "empty.png": b"", "cut.png": good.read_bytes()[:3000]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot read {re.escape(str(tmp_path / name))} as an image"):
            read_image(tmp_path / name)
