import numpy as np
import pytest
import torch
from timm.data import Mixup

from hatnet_train.data.augment import seed_generators
from hatnet_train.data.mixing import draw_mixing, mix, mix_labels

SIZE, CLASSES = 32, 7


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_every_pair_is_mixed_as_timm_mixes_a_batch_of_two(mixup, cutmix):
    images, labels = torch.randn(40, 3, SIZE, SIZE), torch.arange(40) % CLASSES
    draws = []
    for pair in range(20):
        seed_generators(pair)
        draws.append(draw_mixing(SIZE, mixup, cutmix))
    mixing = torch.tensor(draws)
    mixed, targets = mix(images, mixing), mix_labels(labels, mixing, CLASSES, 0.1)
    reference = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=CLASSES)
    for pair in range(20):
        two = slice(2 * pair, 2 * pair + 2)
        seed_generators(pair)
        expected, expected_targets = reference(images[two].clone(), labels[two])
        torch.testing.assert_close(mixed[two], expected)
        torch.testing.assert_close(targets[two], expected_targets)
    assert len({draw[0] for draw in draws}) > 15


def test_an_untouched_pair_stays_as_it_is():
    images = torch.randn(2, 3, 8, 8)
    mixing = torch.tensor([[1.0, 0, 0, 0, 0]])
    assert torch.equal(mix(images, mixing), images)
    assert torch.equal(mix_labels(torch.tensor([3, 1]), mixing, 4, 0.0), torch.eye(4)[[3, 1]])


def test_targets_of_an_image_add_up_to_one():
    mixing = torch.from_numpy(np.random.default_rng(0).random((9, 5))).float()
    targets = mix_labels(torch.arange(18) % 5, mixing, 5, 0.1)
    torch.testing.assert_close(targets.sum(1), torch.ones(18))
    assert targets.min() >= 0.1 / 5 - 1e-6


def test_mixing_keeps_the_dtype_of_the_images():
    images = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)
    assert mix(images, torch.tensor([[0.3, 0, 0, 0, 0], [0.5, 2, 4, 0, 8]])).dtype == torch.bfloat16
