import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import v2

from hatnet_testing import raises
from hatnet_train import build_config
from hatnet_train.data.augment import (
    MEAN,
    STD,
    TrainTransform,
    centre_crop,
    normalise,
    own_generators,
    seed_generators,
)
from hatnet_train.data.images import to_pillow, to_tensor


def config(**overrides):
    """ImageNet's recipe with all of its augmentation off, but for what is given."""
    off = {"min_scale": 1.0, "hflip": 0.0, "rand_augment": "", "random_erasing": 0.0, "image_size": 64}
    return build_config("imagenet", {"data": "synthetic", **off, **overrides})


@pytest.fixture(scope="module")
def image():
    rows, columns = np.mgrid[0:90, 0:120]
    pixels = np.stack([rows * 2, columns * 2, (rows + columns) % 256], -1).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@contextmanager
def seeded(*key):
    with own_generators():
        seed_generators(*key)
        yield


def augmented(transform, image, *key):
    with seeded(*key):
        return transform(image)


def test_seeded_code_draws_the_same_and_leaves_the_generators_as_they_were():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws() for _ in range(2)]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = draws()
    with seeded(3, 4):
        inside = draws()
    assert [first, draws()] == expected
    with seeded(3, 4):
        assert draws() == inside
    with seeded(3, 5):
        assert not set(draws()) & set(inside)


def test_a_random_crop_is_timms_to_within_two_levels(image):
    transform = TrainTransform(config(min_scale=0.08))
    reference = RandomResizedCropAndInterpolation(64, scale=(0.08, 1.0), interpolation="bicubic")
    crops = []
    for key in range(20):
        crops.append(augmented(transform, image, key))
        with seeded(key):
            expected = to_tensor(reference(to_pillow(image)))
        assert (crops[-1].int() - expected.int()).abs().max() <= 2
    assert len({crop.numpy().tobytes() for crop in crops}) == 20


def test_rand_augment_is_that_of_timms_transform_factory(image):
    policy = "rand-m9-mstd0.5-inc1"
    transform = TrainTransform(config(rand_augment=policy))
    factory = create_transform(64, is_training=True, auto_augment=policy, interpolation="bicubic", use_prefetcher=True)
    (reference,) = [step for step in factory.transforms if type(step).__name__ == "RandAugment"]
    square = centre_crop(image, 64, 1.0)
    changed = 0
    for key in range(40):
        with seeded(key):
            expected = to_tensor(reference(to_pillow(square)))
        result = augmented(transform, image, key)
        assert torch.equal(result, expected)
        changed += not torch.equal(result, square)
    assert changed > 20


def test_a_flip_turns_left_and_right_so_often_as_asked_for(image):
    square = centre_crop(image, 64, 1.0)
    results = [augmented(TrainTransform(config(hflip=0.25)), image, key) for key in range(400)]
    flipped = sum(torch.equal(result, square.flip(-1)) for result in results)
    assert flipped + sum(torch.equal(result, square) for result in results) == 400
    assert 60 < flipped < 140


def test_erasing_leaves_the_rest_and_fills_a_rectangle_with_noise_of_unit_deviation(image):
    square = centre_crop(image, 64, 1.0)
    areas, noise = [], []
    for key in range(200):
        result = augmented(TrainTransform(config(random_erasing=0.5)), image, key)
        changed = (result != square).any(0)
        if changed.any():
            rows, columns = changed.any(1).nonzero().ravel(), changed.any(0).nonzero().ravel()
            box = result[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            areas.append(box[0].numel() / 64**2)
            noise.append(normalise(box).flatten())
    assert 70 < len(areas) < 130
    assert 0.01 < min(areas) < max(areas) < 0.37
    values = torch.cat(noise)
    assert values.mean().item() == pytest.approx(0, abs=0.02)
    assert values.std().item() == pytest.approx(1, abs=0.04)  # a little less, since bytes hold no values beyond white


def test_a_shift_moves_the_whole_image_and_fills_with_black(image):
    transform = TrainTransform(config(min_scale=1.0, max_shift=2))
    square = centre_crop(image, 64, 1.0)
    padded = v2.functional.pad(square, [2, 2])
    places = {
        (i, j): padded[:, i : i + 64, j : j + 64].numpy().tobytes() for i in range(5) for j in range(5)
    }  # all that can be
    seen = {augmented(transform, image, key).numpy().tobytes() for key in range(300)}
    assert seen == set(places.values())


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 200), width=st.integers(1, 200), size=st.sampled_from([32, 64]), fraction=st.floats(0.5, 1)
)
def test_the_centre_crop_is_the_middle_of_the_image_resized_by_pillow(height, width, size, fraction):
    rows, columns = np.mgrid[0:height, 0:width]
    image = Image.fromarray((np.stack([rows, columns, rows + columns], -1) % 200).astype(np.uint8))
    scale = round(size / fraction) / min(height, width)
    resized = image.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    expected = to_tensor(resized.crop((left, top, left + size, top + size)))
    result = centre_crop(to_tensor(image), size, fraction)
    assert result.shape == (3, size, size)
    assert (result.int() - expected.int()).abs().max() <= 2  # rows and columns are rounded one after the other


def test_normalised_values_are_those_of_torchvision(image):
    expected = v2.functional.normalize(v2.functional.to_dtype(image, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(normalise(image), expected)
    torch.testing.assert_close(normalise(image[None])[0], expected)


def test_a_policy_that_timm_does_not_know_is_refused():
    with raises(ValueError, "rand_augment", "timm", "'augment-me'"):
        TrainTransform(config(rand_augment="augment-me"))


def test_images_of_any_size_leave_as_squares_of_bytes():
    full = build_config("imagenet", {"data": "synthetic", "image_size": 32})
    for height, width in [(1, 1), (1, 300), (33, 32), (500, 375)]:
        result = augmented(TrainTransform(full), torch.zeros(3, height, width, dtype=torch.uint8), 0)
        assert result.shape == (3, 32, 32)
        assert result.dtype == torch.uint8
