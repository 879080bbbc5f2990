"""Which sequence is read at which position of a run, in closed form: the order has no state."""

import hashlib

import numpy as np
from numpy.typing import NDArray

_CHUNK = 4096
"""Positions that are planned at once; one at a time is five times slower."""
_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Order:
    """Position in the run -> sequence. Each epoch visits every sequence exactly once, each in another order.

    Runs of sqrt(`window`) consecutive sequences are dealt at random to windows, and within a window the sequences
    are shuffled: neighbours share shards, which matters where a shard must be fetched first.
    """

    def __init__(self, n_sequences: int, seed: int, window: int):
        assert n_sequences > 0 and window > 0, (n_sequences, window)
        self.n_sequences = n_sequences
        self._run = max(1, round(window**0.5))
        self._window = self._run * max(1, window // self._run)
        digest = hashlib.blake2b(f"{seed}".encode(), digest_size=8).digest()
        self._key = np.frombuffer(digest, np.uint64)
        self._chunk_number = -1
        self._chunk = np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        """The sequence that is read at `position`, which counts on through all epochs."""
        number, offset = divmod(position, _CHUNK)
        if number != self._chunk_number:
            self._chunk = self.sequences(np.arange(number * _CHUNK, (number + 1) * _CHUNK))
            self._chunk_number = number
        return int(self._chunk[offset])

    def sequences(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sequences that are read at `positions`."""
        n_sequences, window_size, run_size = map(np.uint64, (self.n_sequences, self._window, self._run))
        unsigned = positions.astype(np.uint64)
        epoch, position = unsigned // n_sequences, unsigned % n_sequences
        epoch_key = _mix(self._key + epoch * _GOLDEN)
        window, offset = position // window_size, position % window_size
        size = np.minimum(window_size, n_sequences - window * window_size)
        slot = window * window_size + permute(offset, size, _mix(epoch_key + ~window))
        run, offset = slot // run_size, slot % run_size
        n_runs = np.full_like(run, n_sequences // run_size)
        whole = run < n_runs  # what is left after the whole runs stays at the end of the epoch
        run[whole] = permute(run[whole], n_runs[whole], epoch_key[whole])
        return (run * run_size + offset).astype(np.int64)


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


def _feistel(value: NDArray[np.uint64], half: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for _ in range(_ROUNDS):
        key = key + _GOLDEN
        left, right = right, left ^ (_mix(_mix(key) ^ right) & mask)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: each bit of x changes half of the bits of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
