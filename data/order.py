"""Shuffles a source's sequences anew each epoch, as a stateless function of position and key."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Order:
    """Maps positions to sequences. Each epoch visits every sequence exactly once, in another order.

    Whole runs of `run` consecutive sequences are assigned at random to windows of `window_runs` runs, and the
    sequences of a window are shuffled: neighbours share shards, which matters where shards must be fetched first.
    Position p of a whole window belongs to lane p mod `lanes`, and no two lanes of a window share a run, so nodes that
    read different lanes fetch different shards.
    """

    n_sequences: int
    n_runs: int
    """Whole runs; the remaining sequences stay at the end of the epoch."""
    run: int
    window_runs: int
    """A multiple of `lanes`."""
    lanes: int
    key: np.uint64

    @property
    def window(self) -> int:
        """Sequences in a whole window."""
        return self.run * self.window_runs

    def sequences(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the sequences read at `positions`, which are counted through all epochs."""
        epoch, position = np.divmod(positions.astype(np.uint64), np.uint64(self.n_sequences))
        epoch_key = mix(self.key + epoch * _GOLDEN)
        slot = self._shuffled_in_window(position, epoch_key)
        return self._with_shuffled_runs(slot, epoch_key).astype(np.int64)

    def _shuffled_in_window(self, position: NDArray[np.uint64], epoch_key: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Deals each window's positions to its lanes, and permutes each lane; a shorter last window has one lane.

        A lane is a range of slots, that is of whole runs.
        """
        whole = np.uint64(self.window)
        window, offset = np.divmod(position, whole)
        start = window * whole
        size = np.minimum(whole, np.uint64(self.n_sequences) - start)
        n_lanes = np.where(size == whole, np.uint64(self.lanes), np.uint64(1))
        lane_size = size // n_lanes
        place, lane = np.divmod(offset, n_lanes)
        key = mix(mix(epoch_key + ~window) + lane)
        return start + lane * lane_size + permute(place, lane_size, key)

    def _with_shuffled_runs(self, slot: NDArray[np.uint64], epoch_key: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Permutes the whole runs of the epoch, which spreads each window over the source."""
        run_size = np.uint64(self.run)
        run, offset = np.divmod(slot, run_size)
        n_runs = np.full_like(run, self.n_runs)
        is_whole = run < n_runs
        run[is_whole] = permute(run[is_whole], n_runs[is_whole], epoch_key[is_whole])
        return run * run_size + offset


def key_of(*parts: object) -> np.uint64:
    """Returns a key that depends on every part."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def permute(index: NDArray[np.uint64], size: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies the permutation of range(`size`) that `key` selects to `index`, elementwise over equal shapes.

    A Feistel network permutes the next power of four, and is repeated until the result is in the range (cycle walking;
    Black and Rogaway 2002).
    """
    assert (index < size).all() and (size < 1 << 52).all()
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    result = index.copy()
    todo = np.arange(len(index))
    while len(todo):
        result[todo] = _feistel(result[todo], half[todo], key[todo])
        todo = todo[result[todo] >= size[todo]]
    return result


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Applies the finalizer of splitmix64: each bit of x flips about half of the result's bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(value: NDArray[np.uint64], half: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for _ in range(_ROUNDS):
        key = key + _GOLDEN
        left, right = right, left ^ (mix(mix(key) ^ right) & mask)
    return (left << half) | right
