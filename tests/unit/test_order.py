from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.loading.order import (
    PageWindows,
    SampleOrder,
    batch_bounds,
    count_batches,
    epoch_order,
    pack_keys,
    rank_part,
    sample_indices,
)

SIZES = st.integers(1, 300)
RANKS = st.integers(1, 5)


def local_batches(num_samples, batch_size, world_size, **keywords):
    """Return, for every step, the sample indices of each rank."""
    orders = [
        SampleOrder(num_samples, batch_size, shuffle=True, rank=rank, world_size=world_size, **keywords)
        for rank in range(world_size)
    ]
    return list(zip(*([sample_indices(keys) for keys in order.batches(epoch=2)] for order in orders), strict=True))


@given(SIZES, SIZES, RANKS)
def test_an_epoch_has_every_sample_once_over_all_ranks(num_samples, batch_size, world_size):
    seen = np.concatenate([part for step in local_batches(num_samples, batch_size, world_size) for part in step])
    assert sorted(seen) == list(range(num_samples))


@given(SIZES, SIZES, RANKS)
def test_batches_over_all_ranks_do_not_depend_on_the_number_of_ranks(num_samples, batch_size, world_size):
    alone = local_batches(num_samples, batch_size, 1)
    together = local_batches(num_samples, batch_size, world_size)
    assert [set(np.concatenate(step)) for step in together] == [set(np.concatenate(step)) for step in alone]


@given(SIZES, SIZES)
def test_batches_are_as_few_as_possible_and_balanced(num_samples, batch_size):
    steps = count_batches(num_samples, batch_size)
    bounds = [batch_bounds(num_samples, batch_size, step) for step in range(steps)]
    sizes = [last - first for first, last in bounds]
    assert sum(sizes) == num_samples
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert (steps - 1) * batch_size < num_samples


def test_the_last_batch_is_not_small():
    bounds = [batch_bounds(129, 64, step) for step in range(count_batches(129, 64))]
    assert bounds == [(0, 43), (43, 86), (86, 129)]


def test_order_differs_by_epoch_and_seed_only():
    orders = {
        (seed, epoch): epoch_order(1000, seed, epoch, shuffle=True).tolist() for seed in (-1, 0, 1) for epoch in (0, 1)
    }
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert epoch_order(1000, 1, 1, shuffle=True).tolist() == orders[1, 1]


def test_unshuffled_order_is_that_of_the_beton():
    assert epoch_order(5, seed=3, epoch=8, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_order_and_keys_are_the_same_on_every_machine_and_version():
    assert epoch_order(10, seed=7, epoch=3, shuffle=True).tolist() == [2, 5, 9, 7, 3, 0, 6, 8, 4, 1]
    assert pack_keys(np.array([0, 1, 2**32 - 1]), seed=7, epoch=3).tolist() == [
        16168104605664673792,
        16168104605664673793,
        16168104609959641087,
    ]


def test_keys_contain_the_index_and_differ_by_seed_and_epoch():
    indices = np.array([0, 5, 2**32 - 1])
    packed = {(seed, epoch): pack_keys(indices, seed, epoch) for seed in range(-3, 10) for epoch in range(20)}
    assert all(sample_indices(keys).tolist() == indices.tolist() for keys in packed.values())
    assert len({int(keys[0]) for keys in packed.values()}) == len(packed)


@pytest.mark.parametrize("start_step", [0, 1, 3, 4])
def test_start_step_skips_batches(start_step):
    order = SampleOrder(50, 13, shuffle=True, rank=1, world_size=2)
    resumed, whole = order.batches(4, start_step), order.batches(4)
    assert [keys.tolist() for keys in resumed] == [keys.tolist() for keys in whole[start_step:]]


def test_keys_of_a_rank_are_contiguous():
    assert all(keys.flags.c_contiguous for keys in SampleOrder(50, 13, shuffle=True, world_size=3).batches(0))


def windowed(num_samples, batch_size, world_size, window, seed=0):
    """Return an order for each rank over pages of 7 samples."""
    windows = PageWindows(3 + np.arange(num_samples) // 7, window)
    return [
        SampleOrder(num_samples, batch_size, shuffle=True, seed=seed, rank=rank, world_size=world_size, windows=windows)
        for rank in range(world_size)
    ]


@given(SIZES, SIZES, RANKS, st.integers(1, 6))
def test_an_epoch_of_windows_has_every_sample_once_and_its_batches_do_not_depend_on_ranks(
    num_samples, batch_size, world_size, window
):
    steps = [
        [
            set(sample_indices(np.concatenate(step)))
            for step in zip(*(order.batches(2) for order in orders), strict=True)
        ]
        for orders in (windowed(num_samples, batch_size, ranks, window) for ranks in (1, world_size))
    ]
    assert steps[0] == steps[1]
    assert sorted(index for step in steps[0] for index in step) == list(range(num_samples))


def test_batches_stay_within_the_pages_of_a_window():
    (order,) = windowed(7 * 20, 35, 1, 5)
    for epoch in range(3):
        pages = [set((sample_indices(keys) // 7).tolist()) for keys in order.batches(epoch)]
        assert all(len(read) <= 5 for read in pages)  # a batch is a window here
        assert set.union(*pages) == set(range(20))
    assert order.batches(0)[0].tolist() != order.batches(1)[0].tolist()


def test_a_rank_reads_mostly_its_part_of_the_pages():
    for order in windowed(7 * 512, 128, 4, 64):
        own = np.concatenate(order.pages_ahead(0))
        assert len(own) == 512 / 4
        read = 3 + sample_indices(np.concatenate(order.batches(0))) // 7
        assert np.isin(read, own).mean() > 0.9


@pytest.mark.parametrize(("world_size", "start_step"), [(1, 0), (3, 0), (3, 4)])
def test_every_page_is_fetched_before_its_samples_are_read(world_size, start_step):
    orders = windowed(7 * 64, 28, world_size, 8)
    pages = orders[0].windows.page_order(0, 1)
    places = {page: place for place, page in enumerate(pages.tolist())}
    fetched = [[set(batch.tolist()) for batch in order.pages_ahead(1, start_step)] for order in orders]
    for step, batches in enumerate(zip(*(order.batches(1, start_step) for order in orders), strict=True)):
        so_far = set.union(*(one for rank in fetched for one in rank[: step + 1]))
        needed = set((3 + sample_indices(np.concatenate(batches)) // 7).tolist())
        # A resumed epoch does not fetch a whole window if part of it was read.
        assert {page for page in needed if places[page] >= start_step * 4} <= so_far
    every = [page for rank in fetched for one in rank for page in one]
    assert len(every) == len(set(every))


def test_an_order_without_windows_fetches_nothing():
    assert [len(pages) for pages in SampleOrder(50, 13, shuffle=True).pages_ahead(0, 1)] == [0, 0, 0]


@given(st.lists(st.integers(0, 3), max_size=50))
def test_ranks_divide_a_batch_evenly_and_keep_their_samples(owners):
    parts = [rank_part(np.array(owners, np.int64), rank, 4) for rank in range(4)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(owners)))
    assert [len(part) for part in parts] == [len(part) for part in np.array_split(owners, 4)]
    for rank, part in enumerate(parts):
        assert sum(owners[position] == rank for position in part) == min(len(part), owners.count(rank))
