import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hatnet_testing import raises
from hatnet_train.data.order import GlobalOrder, evaluation_share

IMAGENET = 1_281_167


def batches(order, epoch, world_size, first_step=0):
    """The global batches of an epoch, put together from the shares of all ranks."""
    ranks = [
        order.shares(epoch, rank=rank, world_size=world_size, first_step=first_step) for rank in range(world_size)
    ]
    return [np.concatenate([share.images for share in parts]) for parts in zip(*ranks, strict=True)]


@given(
    steps=st.integers(1, 5),
    share=st.integers(1, 4),
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    rest=st.integers(0, 11),
    repeats=st.integers(1, 4),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 400),
)
def test_any_number_of_processes_sees_the_batches_of_one(steps, share, world_size, rest, repeats, seed, epoch):
    order = GlobalOrder(length=steps * 12 * share + rest, batch_size=12 * share, seed=seed, repeats=repeats)
    alone = batches(order, epoch, 1)
    assert np.array_equal(np.concatenate(alone), order.epoch(epoch))
    assert np.array_equal(alone, batches(order, epoch, world_size))


@given(length=st.integers(1, 300), batch_size=st.integers(1, 50), epoch=st.integers(0, 9))
def test_an_epoch_sees_no_image_twice_and_leaves_out_less_than_a_batch(length, batch_size, epoch):
    seen = GlobalOrder(length=length, batch_size=min(batch_size, length), seed=0).epoch(epoch)
    assert len(set(seen.tolist())) == len(seen) > length - batch_size
    assert 0 <= seen.min() <= seen.max() < length


@given(batch_size=st.integers(12, 60), steps=st.integers(1, 6), rest=st.integers(0, 8), repeats=st.integers(2, 4))
def test_repeated_augmentation_brings_an_image_so_often_its_copies_far_apart(batch_size, steps, rest, repeats):
    seen = GlobalOrder(length=batch_size * steps + rest, batch_size=batch_size, seed=0, repeats=repeats).epoch(3)
    counts = np.bincount(seen)
    assert counts.max() == repeats
    assert (counts[counts > 0] < repeats).sum() <= 1  # where the epoch ends
    for batch in seen.reshape(steps, batch_size):
        for part in np.array_split(batch, repeats):  # first the first copies of all, then the second ones
            assert len(set(part.tolist())) == len(part)
        pairs = list(zip(batch[::2], batch[1::2], strict=False))
        assert sum(first == second for first, second in pairs) < repeats  # at most where two parts meet


def test_copies_of_an_image_are_on_different_ranks_and_have_different_neighbours():
    order = GlobalOrder(length=960, batch_size=96, seed=0, repeats=3)
    ranks = [next(order.shares(0, rank=rank, world_size=3)).images for rank in range(3)]
    assert all(sorted(images) == sorted(ranks[0]) for images in ranks)
    neighbours = [
        dict(zip([*images[::2], *images[1::2]], [*images[1::2], *images[::2]], strict=True)) for images in ranks
    ]
    distinct = [len({partners[image] for partners in neighbours}) for image in ranks[0]]
    assert np.mean(distinct) > 2.5


def test_a_share_knows_its_places_in_the_epoch_and_splits_evenly():
    order = GlobalOrder(length=100, batch_size=12, seed=4)
    shares = list(order.shares(1, rank=2, world_size=3, first_step=5))
    assert shares[0].epoch == 1
    assert shares[0].positions.tolist() == [68, 69, 70, 71]
    assert np.array_equal(order.epoch(1)[shares[0].positions], shares[0].images)
    halves = shares[0].split(2)
    assert [half.positions.tolist() for half in halves] == [[68, 69], [70, 71]]
    assert np.array_equal(np.concatenate([half.images for half in halves]), shares[0].images)


def test_the_order_changes_with_seed_and_epoch():
    first, again, other_epoch, other_seed = (
        GlobalOrder(length=50, batch_size=5, seed=seed).epoch(epoch)
        for seed, epoch in ((3, 7), (3, 7), (3, 8), (4, 7))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other_epoch)
    assert not np.array_equal(first, other_seed)


@pytest.mark.parametrize("first_step", [1, 7, 12])
def test_a_run_goes_on_at_any_step_on_another_number_of_processes(first_step):
    order = GlobalOrder(length=100, batch_size=8, seed=1)
    assert np.array_equal(
        np.array(batches(order, 2, 4, first_step)).reshape(-1, 8), np.array(batches(order, 2, 1))[first_step:]
    )


class OrderOnce(GlobalOrder):
    """The order of an epoch is made once and not by every simulated rank."""

    epoch = functools.cache(GlobalOrder.epoch)


@pytest.mark.parametrize("repeats", [1, 3])
def test_1024_ranks_together_see_imagenet_as_one_process_does_from_any_step(repeats):
    order = OrderOnce(length=IMAGENET, batch_size=4096, seed=0, repeats=repeats)
    ranks = (order.shares(5, rank=rank, world_size=1024) for rank in range(1024))
    seen = np.stack([np.stack([share.images for share in shares]) for shares in ranks], axis=1)  # [steps, ranks, 4]
    alone = np.stack([share.images for share in order.shares(5, rank=0, world_size=1)])
    assert np.array_equal(seen.reshape(alone.shape), alone)
    counts = np.bincount(seen.ravel(), minlength=IMAGENET)
    assert counts.sum() == order.steps * 4096
    assert counts.max() == repeats
    for rank in range(0, 1024, 31):
        later = order.shares(5, rank=rank, world_size=1024, first_step=300)
        assert np.array_equal([share.images for share in later], seen[300:, rank])


@given(length=st.integers(0, 200), world_size=st.integers(1, 64))
def test_every_held_out_image_is_in_the_share_of_exactly_one_rank(length, world_size):
    shares = [evaluation_share(length, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("field", "value"), [("length", 0), ("batch_size", 0), ("repeats", 0), ("batch_size", 101)])
def test_sizes_that_give_no_order_are_refused(field, value):
    with raises(ValueError, field, value):
        GlobalOrder(**{"length": 100, "batch_size": 10, "seed": 0, field: value})


def test_shares_that_do_not_exist_are_refused():
    order = GlobalOrder(length=100, batch_size=10, seed=0)
    with raises(ValueError, "batch_size", 10, 3):
        next(order.shares(0, rank=0, world_size=3))
    with raises(ValueError, "first_step", 10, 11):
        next(order.shares(0, rank=0, world_size=1, first_step=11))
