"""Plans the sequence at each position of a run, as a stateless function of the config and the corpora."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from triplane.data.cuts import Cut, Pieces, Reading
from triplane.data.mixture import BLOCK, Mixture
from triplane.data.order import key_of


class Chunk(NamedTuple):
    """Positions `start` to `stop`, planned together: one at a time is many times slower."""

    start: int
    stop: int
    seq_len: int
    sources: list[int]
    pieces: list[Pieces]


class Plan(Protocol):
    """Maps positions to sources and pieces."""

    @property
    def n_sequences(self) -> int:
        """Sequences in one pass over all sources, at the first length."""

    def chunk(self, position: int) -> Chunk:
        """Plans some positions around `position`."""


class Phase(NamedTuple):
    """The data read from position `start` on."""

    start: int
    weights: Sequence[float]
    cuts: Sequence[Cut]
    """One per source."""
    seq_len: int


class TrainingPlan:
    """Sources mixed by weight, each shuffled epoch after epoch."""

    def __init__(self, phases: Sequence[Phase], seed: int, *, window_runs: int, lanes: int):
        """Raises DataError if a weight is too small, or if the length changes again before a change is complete."""
        self._phases = phases
        self.n_sequences = sum(cut.n_sequences for cut in phases[0].cuts)
        self._mixture = Mixture([(phase.start, phase.weights) for phase in phases], seed, lanes)
        consumed = [self._mixture.consumed(phase.start) for phase in phases]
        self._readings: list[Reading] = []
        for source in range(len(phases[0].cuts)):
            cuts: dict[int, Cut] = {}
            for phase, before in zip(phases, consumed):
                if not cuts or list(cuts.values())[-1] != phase.cuts[source]:
                    cuts[int(before[source])] = phase.cuts[source]
            key = key_of("order", seed, source)
            self._readings.append(Reading(cuts, window_runs=window_runs, lanes=lanes, key=key))

    def chunk(self, position: int) -> Chunk:
        draw = self._mixture.draw(position)
        pieces: list[Pieces] = [()] * len(draw.sources)
        for source in np.unique(draw.sources).tolist():
            at = np.flatnonzero(draw.sources == source)
            numbers = draw.numbers[at]
            for i, sequence in zip(at.tolist(), self._readings[source].read(int(numbers[0]), int(numbers[-1]) + 1)):
                pieces[i] = sequence
        seq_len = self._phases[bisect_right(self._phases, position, key=lambda phase: phase.start) - 1].seq_len
        return Chunk(start=draw.start, stop=draw.stop, seq_len=seq_len, sources=draw.sources.tolist(), pieces=pieces)

    def epochs(self, position: int) -> list[float]:
        """Returns the epochs of each source completed before `position`."""
        counts = self._mixture.consumed(position).tolist()
        return [reading.epochs(count) for reading, count in zip(self._readings, counts)]


class StoredPlan:
    """Sequences in stored order, alternating between the sources until each ends; then empty ones."""

    def __init__(self, cuts: Sequence[Cut], seq_len: int):
        self._cuts = cuts
        self._seq_len = seq_len
        self.n_sequences = sum(cut.n_sequences for cut in cuts)

    def chunk(self, position: int) -> Chunk:
        start = position // BLOCK * BLOCK
        located = [self._locate(p) for p in range(start, start + BLOCK)]
        pieces = [self._cuts[source].pieces(np.array([n]))[0] if n >= 0 else () for source, n in located]
        return Chunk(
            start=start,
            stop=start + BLOCK,
            seq_len=self._seq_len,
            sources=[source for source, _ in located],
            pieces=pieces,
        )

    def _locate(self, position: int) -> tuple[int, int]:
        """Returns source and sequence, -1 past the end."""
        turn = 0
        left = list(range(len(self._cuts)))
        while left:
            shortest = min(self._cuts[source].n_sequences for source in left)
            if position < (shortest - turn) * len(left):
                return left[position % len(left)], turn + position // len(left)
            position -= (shortest - turn) * len(left)
            turn = shortest
            left = [source for source in left if self._cuts[source].n_sequences > shortest]
        return 0, -1
