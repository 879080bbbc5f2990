"""The order is an exact permutation in each epoch, and any position of it is found at once."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triplane.data.order import Order, permute

_SIZES = st.integers(1, 5000)
_SEEDS = st.integers(0, 2**63)


def _epoch(order: Order, epoch: int) -> list[int]:
    start = epoch * order.n_sequences
    return [int(i) for i in order.sequences(np.arange(start, start + order.n_sequences))]


@given(size=_SIZES, key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    moved = permute(index, np.full_like(index, size), np.full_like(index, key))
    assert sorted(moved.tolist()) == list(range(size))


@given(size=_SIZES, seed=_SEEDS, window=st.integers(1, 6000), epoch=st.integers(0, 10**9))
def test_each_epoch_visits_each_sequence_once(size: int, seed: int, window: int, epoch: int) -> None:
    assert sorted(_epoch(Order(size, seed, window), epoch)) == list(range(size))


@given(size=_SIZES, seed=_SEEDS, window=st.integers(1, 6000), position=st.integers(0, 10**12))
def test_a_position_is_the_same_alone_and_among_others(size: int, seed: int, window: int, position: int) -> None:
    order = Order(size, seed, window)
    around = order.sequences(np.arange(position, position + 3))
    assert [order[position + i] for i in range(3)] == around.tolist()


def test_epochs_and_seeds_differ() -> None:
    orders = [_epoch(Order(1000, seed, 64), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 6


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_order_of_a_few_is_equally_likely(size: int) -> None:
    epochs = 24_000
    orders = Order(size, 1, 4096).sequences(np.arange(size * epochs)).reshape(-1, size)
    counts = np.array(list(Counter(map(tuple, orders.tolist())).values()))
    expected = epochs / np.prod(np.arange(1, size + 1))
    assert len(counts) == epochs // expected and (abs(counts - expected) < 5 * expected**0.5).all()


def test_a_window_reads_few_runs() -> None:
    window = Order(10**7, 1, 4096).sequences(np.arange(4096))
    assert len(np.unique(window // 64)) == 64
    assert (np.diff(window) == 1).sum() < 10  # and yet no run is read in its stored order


def test_a_far_position_is_found_at_once() -> None:
    started = time.process_time()
    assert 0 <= Order(10**7, 1, 4096)[10**12] < 10**7
    assert time.process_time() - started < 0.1
