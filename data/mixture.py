"""Assigns a source to each position of a run, as a stateless function."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from triplane.data.order import key_of, permute
from triplane.storage.errors import DataError

BLOCK = 4096
"""Positions that are mixed and planned together."""
_LEVELS = 12
"""A cycle of 2^12 blocks matches the shares of the sources exactly; 12 halvings reach one block."""


class Draw(NamedTuple):
    """The reads at positions `start` to `stop`: sequence `numbers[i]` of source `sources[i]`."""

    start: int
    stop: int
    sources: NDArray[np.int64]
    numbers: NDArray[np.int64]
    """Counted through all epochs of the source; consecutive within a source."""


class Mixture:
    """Maps positions to sources and how often each was read before.

    In each cycle of 2^24 positions a source has its exact share, to 1 in 2^24 / lanes. Cycles are halved down to
    blocks, each half with half of its parent's count, so that blocks are exact to less than one lane group and counts
    never drift. `lanes` neighbouring positions read the same source.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]], seed: int, lanes: int):
        """A phase is its first position, a multiple of `lanes`, and the weight of each source; the first starts at 0.

        Raises DataError if a weight is too small ever to be drawn.
        """
        assert phases[0][0] == 0 and all(a < b for (a, _), (b, _) in pairwise(phases)), phases
        assert BLOCK % lanes == 0 and all(start % lanes == 0 for start, _ in phases), (lanes, phases)
        self._lanes = lanes
        self._seed = seed
        self._starts = [start for start, _ in phases]
        self._shares = [_apportion(weights, (BLOCK << _LEVELS) // lanes) for _, weights in phases]
        self._before = [np.zeros(len(phases[0][1]), np.int64)]
        """Reads of each source before each phase."""
        for start in self._starts[1:]:
            self._before.append(self.consumed(start))

    def consumed(self, position: int) -> NDArray[np.int64]:
        """Returns (sources,) reads of each before `position`."""
        if position == 0:
            return self._before[0]
        draw = self.draw(position - 1)
        counts = self._before[0].copy()
        for source in range(len(counts)):
            numbers = draw.numbers[: position - draw.start][draw.sources[: position - draw.start] == source]
            counts[source] = numbers[-1] + 1 if len(numbers) else self._first_numbers(position - 1)[source]
        return counts

    def draw(self, position: int) -> Draw:
        """Returns the block around `position`, truncated where the next phase starts."""
        phase, block = self._locate(position)
        start = self._starts[phase] + block * BLOCK
        stop = min([start + BLOCK, *self._starts[phase + 1 : phase + 2]])
        _, counts = self._counts(phase, block)
        groups = np.repeat(np.arange(len(counts)), counts)
        index = np.arange(len(groups), dtype=np.uint64)
        key = np.full_like(index, key_of("mixture", self._seed, self._starts[phase], block))
        groups = groups[permute(index, np.full_like(index, len(groups)), key).astype(np.int64)]
        sources = np.repeat(groups, self._lanes)
        numbers = np.empty(BLOCK, np.int64)
        first_numbers = self._first_numbers(position)
        numbers[np.argsort(sources, kind="stable")] = np.concatenate(
            [first + np.arange(count * self._lanes) for first, count in zip(first_numbers, counts)]
        )
        return Draw(start=start, stop=stop, sources=sources[: stop - start], numbers=numbers[: stop - start])

    def _locate(self, position: int) -> tuple[int, int]:
        """Returns the phase of `position`, and its block in the phase."""
        phase = int(np.searchsorted(self._starts, position, "right")) - 1
        return phase, (position - self._starts[phase]) // BLOCK

    def _first_numbers(self, position: int) -> NDArray[np.int64]:
        """Returns (sources,) reads of each before the block of `position`."""
        phase, block = self._locate(position)
        return self._before[phase] + self._counts(phase, block)[0] * self._lanes

    def _counts(self, phase: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns (sources,) lane groups of the phase before the block, and in the block."""
        cycle, path = divmod(block, 1 << _LEVELS)
        inside = self._shares[phase]
        before = cycle * inside
        for level in reversed(range(_LEVELS)):
            left = inside // 2
            # An even number of sources have an odd count: every other one gets its odd group in the left half.
            left[np.flatnonzero(inside % 2)[level % 2 :: 2]] += 1
            if path >> level & 1:
                before, inside = before + left, inside - left
            else:
                inside = left
        return before, inside


def _apportion(weights: Sequence[float], seats: int) -> NDArray[np.int64]:
    """Returns (sources,) integers that sum to `seats`, in proportion to `weights`, by largest remainders."""
    quotas = np.array(weights, np.float64) / sum(weights) * seats
    shares = np.floor(quotas).astype(np.int64)
    remainders = np.argsort(shares - quotas, kind="stable")
    shares[remainders[: seats - shares.sum()]] += 1
    for source, (weight, share) in enumerate(zip(weights, shares)):
        if weight > 0 and share == 0:
            raise DataError(
                f"data: weight {weight} of source {source + 1} is less than 1 / {seats} of their sum {sum(weights)}: "
                f"give it a larger one, or 0"
            )
    return shares
