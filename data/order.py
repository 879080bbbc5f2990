"""A keyed shuffle of a source's sequences, epoch after epoch, in closed form: the order has no state."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Order:
    """Position in a source's reading -> sequence. Each epoch visits every sequence exactly once, in another order.

    Whole runs of `run` consecutive sequences are dealt at random to windows of `window_runs` runs, and within a
    window the sequences are shuffled: neighbours share shards, which matters where a shard must be fetched first.
    Position p of a whole window belongs to lane p mod `lanes`, and each lane reads runs that no other lane reads in
    this window: nodes that read different lanes fetch different shards.
    """

    n_sequences: int
    n_runs: int
    """Whole runs; what is left after them stays at the end of the epoch."""
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
        """The sequences that are read at `positions`, which count on through all epochs."""
        n_sequences, run_size, lanes = map(np.uint64, (self.n_sequences, self.run, self.lanes))
        window_size = np.uint64(self.window)
        unsigned = positions.astype(np.uint64)
        epoch, position = unsigned // n_sequences, unsigned % n_sequences
        epoch_key = mix(self.key + epoch * _GOLDEN)
        window, offset = position // window_size, position % window_size
        size = np.minimum(window_size, n_sequences - window * window_size)
        n_lanes = np.where(size == window_size, lanes, np.uint64(1))
        lane, lane_size = offset % n_lanes, size // n_lanes
        key = mix(mix(epoch_key + ~window) + lane)
        slot = window * window_size + lane * lane_size + permute(offset // n_lanes, lane_size, key)
        run, offset = slot // run_size, slot % run_size
        n_runs = np.full_like(run, self.n_runs)
        whole = run < n_runs
        run[whole] = permute(run[whole], n_runs[whole], epoch_key[whole])
        sequences: NDArray[np.int64] = (run * run_size + offset).astype(np.int64)
        return sequences


def key_of(*parts: object) -> np.uint64:
    """A key that depends on each part."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def permute(index: NDArray[np.uint64], size: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where each `index` goes under the permutation of range(`size`) that its `key` names; equal shapes.

    A Feistel network permutes the next power of four, and is applied until it leads back into the range (cycle
    walking; Black and Rogaway 2002).
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
    """The finalizer of splitmix64: each bit of x changes half of the bits of the result."""
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
