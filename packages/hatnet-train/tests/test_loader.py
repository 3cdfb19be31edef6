import numpy as np
import pytest
import torch
from PIL import Image

from hatnet_testing import raises
from hatnet_train import build_config
from hatnet_train.data import open_split
from hatnet_train.data.augment import centre_crop
from hatnet_train.data.folder import Folder
from hatnet_train.data.loader import evaluation_batches, train_batches
from hatnet_train.data.order import GlobalOrder
from hatnet_train.data.source import Digits


def config(**overrides):
    """The digits with all of ImageNet's augmentation, in batches of 24 for three epochs."""
    everything = {
        "min_scale": 0.2,
        "max_shift": 0,
        "hflip": 0.5,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "repeats": 3,
    }
    return build_config("digits", {"batch_size": 24, "epochs": 3, "workers": 0, **everything, **overrides})


@pytest.fixture(scope="module")
def digits():
    return Digits(train=True)


def first(count, source, settings, rank=0, world_size=1, first_step=0):
    order = GlobalOrder(
        length=len(source),
        batch_size=settings.optimisation.batch_size,
        seed=settings.optimisation.seed,
        repeats=settings.augmentation.repeats,
    )
    batches = train_batches(source, order, settings, rank=rank, world_size=world_size, first_step=first_step)
    return [batch for _, batch in zip(range(count), batches, strict=False)]


def joined(batches):
    assert not any(batch.bad for batch in batches)
    return [torch.cat(parts) for parts in zip(*[batch[:3] for batch in batches], strict=True)]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(joined(ours), joined(theirs), strict=True))


def test_the_ranks_together_see_the_very_batches_of_one_process(digits):
    alone = first(2, digits, config())
    ranks = [first(2, digits, config(), rank=rank, world_size=4) for rank in range(4)]
    for step in range(2):
        assert equal([alone[step]], [batches[step] for batches in ranks])


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_same_batches(workers, digits):
    assert equal(first(7, digits, config()), first(7, digits, config(workers=workers)))


def test_accumulation_cuts_a_step_into_pieces(digits):
    whole, pieces = first(1, digits, config()), first(6, digits, config(accumulation=6))
    assert all(len(piece.images) == 4 for piece in pieces)
    assert equal(whole, pieces)


def test_a_run_goes_on_at_any_step_also_of_a_later_epoch(digits):
    order = GlobalOrder(length=len(digits), batch_size=24, seed=0, repeats=3)
    whole = list(train_batches(digits, order, config(hflip=0.0, rand_augment=""), rank=1, world_size=4))
    assert len(whole) == 3 * order.steps
    for step in (3, order.steps, order.steps + 7, 3 * order.steps - 1):
        rest = first(2, digits, config(hflip=0.0, rand_augment=""), rank=1, world_size=4, first_step=step)
        assert equal(whole[step : step + 2], rest)


def test_an_image_is_augmented_anew_in_every_epoch_and_for_every_repeat(digits):
    order = GlobalOrder(length=len(digits), batch_size=24, seed=0, repeats=3)
    numbers = order.epoch(0)[:24]
    batch = first(1, digits, config())[0]
    assert torch.equal(batch.labels, torch.from_numpy(digits.labels[numbers]))
    for number in set(numbers.tolist()):
        copies = [batch.images[i].numpy().tobytes() for i in np.flatnonzero(numbers == number)]
        assert len(copies) == 3
        assert len(set(copies)) == 3


def test_seeds_change_order_augmentation_and_mixing(digits):
    one, two = first(1, digits, config())[0], first(1, digits, config(seed=1))[0]
    assert not torch.equal(one.images, two.images)
    assert not torch.equal(one.mixing, two.mixing)


def test_without_mixing_nothing_is_drawn_for_it(digits):
    assert first(1, digits, config(mixup=0.0, cutmix=0.0))[0].mixing.shape == (0, 5)


def test_making_batches_leaves_the_generator_of_dropout_alone(digits):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first(2, digits, config(workers=1))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("world_size", [1, 2, 7, 361])
@pytest.mark.parametrize("batch_size", [1, 32, 1000])
def test_every_held_out_image_comes_once_and_every_rank_has_as_many_batches(world_size, batch_size):
    held_out = Digits(train=False)
    counts, seen = set(), []
    for rank in range(world_size):
        batches = list(
            evaluation_batches(
                held_out,
                size=32,
                crop_fraction=1.0,
                batch_size=batch_size,
                workers=0,
                rank=rank,
                world_size=world_size,
            )
        )
        counts.add((len(batches), *{len(batch.images) for batch in batches}))
        for batch in batches:
            seen += [(image.numpy().tobytes(), int(y)) for image, y in zip(*batch[:2], strict=True) if y >= 0]
    assert len(counts) == 1
    expected = [
        (centre_crop(held_out.image(i), 32, 1.0).numpy().tobytes(), int(held_out.labels[i])) for i in range(360)
    ]
    assert sorted(seen) == sorted(expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_none_ends_the_run_with_its_path_and_no_traceback_of_a_worker(workers, tmp_path):
    for name in "ab":
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (40, 30)).save(tmp_path / "train" / name / f"{i}.png")
    (tmp_path / "train" / "a" / "7.png").write_bytes(b"no image")
    source = open_split(str(tmp_path), train=True, size=32)
    assert isinstance(source, Folder)
    with raises(ValueError, tmp_path / "train" / "a" / "7.png", 8) as caught:
        first(1, source, config(workers=workers, repeats=1))
    assert "\n" not in str(caught.value)
