"""How a source is cut into sequences, and in which order they are read, also where their length changes."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from triplane.data.order import Order
from triplane.storage.errors import DataError

Piece = tuple[int, int]
"""Token of the source at which it starts, and how many of the tokens after that one it predicts."""
Pieces = tuple[Piece, ...]
"""A sequence: pieces laid end to end, which do not see each other."""


class Cut(Protocol):
    """The sequences of a source, in stored order."""

    @property
    def n_sequences(self) -> int: ...
    @property
    def run(self) -> int:
        """Sequences in a run, which is shuffled as a whole."""

    @property
    def n_runs(self) -> int:
        """Whole runs."""

    def pieces(self, numbers: NDArray[np.int64]) -> list[Pieces]:
        """What these sequences are made of."""


class Even(NamedTuple):
    """Sequences of `seq_len` targets end to end; the last one may be shorter. Every token but the first is a target."""

    tokens: int
    seq_len: int
    run_tokens: int
    """A multiple of `seq_len`, and the same for all lengths of a run: where a run starts does not depend on them."""

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
    """From its sequence `first` on, a source is read in `order`, whose position then is `base`."""

    first: int
    base: int
    cut: Cut
    order: Order

    def read(self, first: int, stop: int) -> list[Pieces]:
        return self.cut.pieces(self.order.sequences(np.arange(first, stop) - self.first + self.base))

    def epochs(self, k: int) -> float:
        return (self.base + k - self.first) / self.order.n_sequences


class _Rest(NamedTuple):
    """From its sequence `first` on, what an old order has at the positions `base` to `stop` in another length.

    Old sequences are joined, or cut into parts; either length divides the other.
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
    """The k-th sequence of a source, k counting on through all epochs.

    Where the length changes, the window that has been begun is finished in its old sequences, joined or cut to the
    new length and never seeing each other; from the next window on the text is cut to the new length. So each epoch
    still has every target once. A window holds the same text in every length.
    """

    def __init__(self, cuts: Mapping[int, Cut], window_runs: int, lanes: int, key: np.uint64):
        """`cuts` are what is read from the k of each on, ascending from 0; all are `Even` if they are several.

        Raises DataError if the length changes again before it has changed.
        """

        def stretch(first: int, base: int, cut: Cut) -> _Stretch:
            return _Stretch(first, base, cut, Order(cut.n_sequences, cut.n_runs, cut.run, window_runs, lanes, key))

        last = stretch(0, 0, cuts[0])
        self._stretches: list[_Stretch | _Rest] = [last]
        for k, cut in list(cuts.items())[1:]:
            assert isinstance(last.cut, Even) and isinstance(cut, Even)
            if k < last.first:
                raise DataError(
                    f"data.phases: seq_len becomes {cut.seq_len} at sequence {k:,} of a source, in the window that is "
                    f"still finished after the change to {last.cut.seq_len}: let it change {last.first - k:,} "
                    f"sequences of this source later"
                )
            base = last.base + k - last.first
            n_sequences, window = last.order.n_sequences, last.order.window
            epoch, position = divmod(base, n_sequences)
            number = -(-position // window)
            stop = min(epoch * n_sequences + number * window, (epoch + 1) * n_sequences)
            rest = _Rest(k, base, stop, last, last.cut.seq_len, cut.seq_len)
            if rest.sequences:
                self._stretches.append(rest)
            if stop == (epoch + 1) * n_sequences:
                epoch, number = epoch + 1, 0
            last = stretch(k + rest.sequences, 0, cut)
            last = last._replace(base=epoch * last.order.n_sequences + number * last.order.window)
            self._stretches.append(last)

    def epochs(self, k: int) -> float:
        """How often the source was read before its sequence `k`."""
        stretch = next(stretch for stretch in reversed(self._stretches) if stretch.first <= k)
        return stretch.epochs(k)

    def read(self, first: int, stop: int) -> list[Pieces]:
        """What the sequences `first` to `stop` are made of."""
        ends = [stretch.first for stretch in self._stretches[1:]] + [stop]
        pieces: list[Pieces] = []
        for stretch, end in zip(self._stretches, ends):
            start, end = max(first, stretch.first), min(stop, end)
            if start < end:
                pieces += stretch.read(start, end)
        return pieces
