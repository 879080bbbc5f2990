"""The order is an exact permutation in each epoch, and any position of it is found at once."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triplane.data.order import Order, key_of, permute

_SIZES = st.integers(1, 3000)
_SEEDS = st.integers(0, 2**63)


def _order(size: int, seed: int = 1, run: int = 64, window_runs: int = 64, lanes: int = 1) -> Order:
    return Order(
        n_sequences=size,
        n_runs=size // run,
        run=run,
        window_runs=window_runs * lanes,
        lanes=lanes,
        key=key_of(seed),
    )


def _epoch(order: Order, epoch: int) -> list[int]:
    start = epoch * order.n_sequences
    return order.sequences(np.arange(start, start + order.n_sequences)).tolist()


@given(size=_SIZES, key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    moved = permute(index, np.full_like(index, size), np.full_like(index, key))
    assert sorted(moved.tolist()) == list(range(size))


@given(
    size=_SIZES,
    seed=_SEEDS,
    run=st.integers(1, 70),
    window_runs=st.integers(1, 9),
    lanes=st.sampled_from([1, 2, 8]),
    epoch=st.integers(0, 10**9),
)
def test_each_epoch_visits_each_sequence_once(
    size: int, seed: int, run: int, window_runs: int, lanes: int, epoch: int
) -> None:
    assert sorted(_epoch(_order(size, seed, run, window_runs, lanes), epoch)) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = [_epoch(_order(1000, seed, 8, 8), epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(map(tuple, orders))) == 6


def test_windows_and_lanes_are_shuffled_differently() -> None:
    """Ten windows of a run for each of two lanes: no two runs are read in the same order."""
    order = _order(20 * 64, run=64, window_runs=1, lanes=2)
    lanes = np.array(_epoch(order, 0)).reshape(10, 64, 2) % 64
    assert len({tuple(lanes[window, :, lane].tolist()) for window in range(10) for lane in range(2)}) == 20


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_order_of_a_few_is_equally_likely(size: int) -> None:
    epochs = 24_000
    orders = _order(size).sequences(np.arange(size * epochs)).reshape(-1, size)
    counts = np.array(list(Counter(map(tuple, orders.tolist())).values()))
    expected = epochs / np.prod(np.arange(1, size + 1))
    assert len(counts) == epochs // expected and (abs(counts - expected) < 5 * expected**0.5).all()


def test_a_window_reads_few_runs() -> None:
    window = _order(10**7).sequences(np.arange(4096))
    assert len(np.unique(window // 64)) == 64
    assert (np.diff(window) == 1).sum() < 10  # and yet no run is read in its stored order


def test_lanes_read_disjoint_runs_of_a_window() -> None:
    window = _order(10**6, window_runs=8, lanes=8).sequences(np.arange(4096) + 3 * 4096)
    runs = [set((window[lane::8] // 64).tolist()) for lane in range(8)]
    assert all(len(lane) == 8 for lane in runs) and len(set().union(*runs)) == 64
