"""The peak is that of allocations and releases worked out by hand."""

import torch

from hatnet_analysis import peak_memory

CPU = torch.device("cpu")
MEGABYTE = torch.Size([256, 1024])  # of float32


def test_what_is_released_before_the_next_allocation_does_not_add_up():
    def two_at_a_time():
        x = torch.ones(MEGABYTE)
        for _ in range(5):
            x = x + 1  # the old one goes when the new one is there

    assert peak_memory(two_at_a_time, CPU) == 2 * 2**20 + _scalars(two_at_a_time)


def test_what_stays_adds_up():
    def all_of_them():
        return [torch.ones(MEGABYTE) for _ in range(5)]

    assert peak_memory(all_of_them, CPU) == 5 * 2**20 + _scalars(all_of_them)


def test_what_was_there_before_does_not_count():
    before = torch.ones(MEGABYTE)
    assert peak_memory(lambda: before.sum(), CPU) < 2**10


def test_what_was_there_before_and_is_released_makes_no_room_on_a_cpu():
    before = [torch.ones(MEGABYTE)]

    def exchange():
        before.clear()
        before.append(torch.ones(MEGABYTE))

    assert peak_memory(exchange, CPU) == 2**20


def _scalars(work):
    """PyTorch keeps a Python number as a tensor of some bytes while it adds it."""
    surplus = peak_memory(work, CPU) % 2**20
    assert surplus < 2**10
    return surplus
