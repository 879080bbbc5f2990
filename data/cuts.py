"""Cuts a source into sequences, and orders them across changes of their length."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from triplane.data.order import Order
from triplane.storage.errors import DataError

Piece = tuple[int, int]
"""First token in the source, and the number of following tokens that it predicts."""
Pieces = tuple[Piece, ...]
"""A sequence: pieces end to end, which do not attend to each other."""


class Cut(Protocol):
    """The sequences of a source, in stored order."""

    @property
    def n_sequences(self) -> int: ...
    @property
    def run(self) -> int:
        """Sequences in a run, the unit that is shuffled as a whole."""

    @property
    def n_runs(self) -> int:
        """Whole runs."""

    def pieces(self, numbers: NDArray[np.int64]) -> list[Pieces]:
        """Returns the pieces of these sequences."""


class Even(NamedTuple):
    """Sequences of `seq_len` targets end to end; the last one may be shorter. Every token but the first is a target."""

    tokens: int
    seq_len: int
    run_tokens: int
    """A multiple of `seq_len`, the same for all lengths of a source, so that runs always start at the same tokens."""

    @property
    def n_sequences(self) -> int:
        return -(-(self.tokens - 1) // self.seq_len)

    @property
    def run(self) -> int:
        return self.run_tokens // self.seq_len

    @property
    def n_runs(self) -> int:
        return (self.tokens - 1) // self.run_tokens

    def pieces(self, numbers: NDArray[np.int64]) -> list[Pieces]:
        starts = numbers * self.seq_len
        counts = np.minimum(self.seq_len, self.tokens - 1 - starts)
        return [(piece,) for piece in zip(starts.tolist(), counts.tolist())]


class _Stretch(NamedTuple):
    """Reads a source in `order`, starting with its sequence `first` at the order's position `base`."""

    first: int
    base: int
    cut: Cut
    order: Order

    def read(self, first: int, stop: int) -> list[Pieces]:
        return self.cut.pieces(self.order.sequences(np.arange(first, stop) - self.first + self.base))

    def epochs(self, k: int) -> float:
        return (self.base + k - self.first) / self.order.n_sequences


class _Rest(NamedTuple):
    """Reads positions `base` to `stop` of an old order in a new length, starting with sequence `first` of the source.

    Joins old sequences, or cuts them into parts; one length divides the other.
    """

    first: int
    base: int
    stop: int
    old: _Stretch
    old_len: int
    new_len: int

    @property
    def sequences(self) -> int:
        left = self.stop - self.base
        if self.new_len > self.old_len:
            return -(-left // (self.new_len // self.old_len))
        return left * (self.old_len // self.new_len)

    def read(self, first: int, stop: int) -> list[Pieces]:
        joined, parts = max(1, self.new_len // self.old_len), max(1, self.old_len // self.new_len)
        numbers = np.arange(first, stop) - self.first
        from_ = self.base + numbers[0] * joined // parts
        to = min(self.base + -(-((numbers[-1] + 1) * joined) // parts), self.stop)
        old = self.old.cut.pieces(self.old.order.sequences(np.arange(from_, to)))
        if parts == 1:
            return [
                tuple(piece for pieces in old[i : i + joined] for piece in pieces) for i in range(0, len(old), joined)
            ]
        cut: list[Pieces] = []
        for number in numbers.tolist():
            ((start, count),) = old[self.base + number // parts - from_]
            skipped = number % parts * self.new_len
            cut.append(((start + skipped, min(self.new_len, count - skipped)),) if count > skipped else ())
        return cut

    def epochs(self, k: int) -> float:
        old = min(self.base + (k - self.first) * self.new_len / self.old_len, self.stop)
        return old / self.old.order.n_sequences


class Reading:
    """Maps k to the k-th sequence read from a source, counted through all epochs.

    When the length changes, the current window is finished with its old sequences, joined or cut to the new length,
    which do not attend to each other; from the next window on the text is cut to the new length. Each epoch thus still
    visits every target once. A window covers the same text in every length.
    """

    def __init__(self, cuts: Mapping[int, Cut], *, window_runs: int, lanes: int, key: np.uint64):
        """`cuts` maps the k at which each cut starts to the cut, ascending from 0; several must all be `Even`.

        Raises DataError if the length changes again before the previous change is complete.
        """

        def stretch(first: int, base: int, cut: Cut) -> _Stretch:
            order = Order(
                n_sequences=cut.n_sequences,
                n_runs=cut.n_runs,
                run=cut.run,
                window_runs=window_runs,
                lanes=lanes,
                key=key,
            )
            return _Stretch(first=first, base=base, cut=cut, order=order)

        last = stretch(0, 0, cuts[0])
        self._stretches: list[_Stretch | _Rest] = [last]
        for k, cut in list(cuts.items())[1:]:
            assert isinstance(last.cut, Even) and isinstance(cut, Even)
            if k < last.first:
                raise DataError(
                    f"data.phases: seq_len changes to {cut.seq_len} at sequence {k:,} of a source, before the window "
                    f"of the change to {last.cut.seq_len} is finished: change it {last.first - k:,} sequences of this "
                    f"source later"
                )
            base = last.base + k - last.first
            n_sequences, window = last.order.n_sequences, last.order.window
            epoch, position = divmod(base, n_sequences)
            number = -(-position // window)
            stop = min(epoch * n_sequences + number * window, (epoch + 1) * n_sequences)
            rest = _Rest(first=k, base=base, stop=stop, old=last, old_len=last.cut.seq_len, new_len=cut.seq_len)
            if rest.sequences:
                self._stretches.append(rest)
            if stop == (epoch + 1) * n_sequences:
                epoch, number = epoch + 1, 0
            last = stretch(k + rest.sequences, 0, cut)
            last = last._replace(base=epoch * last.order.n_sequences + number * last.order.window)
            self._stretches.append(last)

    def epochs(self, k: int) -> float:
        """Returns the epochs completed before sequence `k`."""
        stretch = next(stretch for stretch in reversed(self._stretches) if stretch.first <= k)
        return stretch.epochs(k)

    def read(self, first: int, stop: int) -> list[Pieces]:
        """Returns the pieces of sequences `first` to `stop`."""
        ends = [stretch.first for stretch in self._stretches[1:]] + [stop]
        pieces: list[Pieces] = []
        for stretch, end in zip(self._stretches, ends):
            start, end = max(first, stretch.first), min(stop, end)
            if start < end:
                pieces += stretch.read(start, end)
        return pieces
