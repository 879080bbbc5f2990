"""Which tokens of the stream a rank of a ring holds, and which of another rank's keys its queries see."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from triplane.model import flash
from triplane.model.batch import Batch
from triplane.model.tiles import Span


@dataclass(frozen=True)
class Share:
    """A rank's two chunks of the stream."""

    rank: int
    size: int
    chunk: int
    """Tokens per chunk."""

    @property
    def early(self) -> int:
        return self.rank * self.chunk

    @property
    def late(self) -> int:
        return (2 * self.size - 1 - self.rank) * self.chunk

    def before(self, position: int) -> int:
        """Returns the number of tokens of the share before `position` of the stream."""
        return sum(min(max(position - start, 0), self.chunk) for start in (self.early, self.late))

    def segments(self, batch: Batch) -> flash.Segments:
        """Returns the share's part of each document."""
        early, late = ((batch.bounds_int32 - start).clamp(0, self.chunk) for start in (self.early, self.late))
        return flash.Segments(early + late, min(batch.longest, 2 * self.chunk))


class Seen(NamedTuple):
    """Keys of a share that a reader's queries see."""

    keys: tuple[slice, ...]
    """At most one run of each chunk of the owner's share; they are sent one after another."""
    spans: tuple[tuple[Span, ...], ...]
    """The reader's queries, in its share, against keys, in what is sent; no token is twice in a group."""

    @property
    def tokens(self) -> int:
        return sum(keys.stop - keys.start for keys in self.keys)


@lru_cache(maxsize=256)  # all layers ask the same
def seen(bounds: tuple[int, ...], reader: Share, owner: Share, window: int | None) -> Seen:
    """Returns the keys of `owner` that causal queries of `reader` see within documents and the window."""
    runs, groups, sent = [], [], 0
    for owned in (owner.early, owner.late):
        by_chunk = [
            _meetings(bounds, read, owned, owner.chunk, window or bounds[-1]) for read in (reader.early, reader.late)
        ]
        meetings = [meeting for chunk in by_chunk for meeting in chunk]
        if not meetings:
            continue
        first, last = min(keys.start for _, keys in meetings), max(keys.stop for _, keys in meetings)
        place = sent - first
        groups += [
            tuple(
                Span(
                    slice(reader.before(queries.start), reader.before(queries.stop)),
                    slice(keys.start + place, keys.stop + place),
                    queries.start - keys.start,
                )
                for queries, keys in chunk
            )
            for chunk in by_chunk
            if chunk
        ]
        runs.append(slice(owner.before(first), owner.before(last)))
        sent += last - first
    return Seen(tuple(runs), tuple(groups))


def _meetings(bounds: tuple[int, ...], read: int, owned: int, chunk: int, window: int) -> list[tuple[slice, slice]]:
    """Returns, document by document, which queries of one chunk see which keys of another, in the stream's numbers."""
    found = []
    starts, stops = (read, owned), (read + chunk, owned + chunk)
    for i in range(max(bisect_right(bounds, x) for x in starts) - 1, min(bisect_left(bounds, x) for x in stops)):
        first_query, first_key = (max(bounds[i], x) for x in starts)
        after_query, after_key = (min(bounds[i + 1], x) for x in stops)
        keys = slice(max(first_key, first_query - window + 1), min(after_key, after_query))
        queries = slice(max(first_query, keys.start), min(after_query, keys.stop - 1 + window))
        if keys.start < keys.stop and queries.start < queries.stop:
            found.append((queries, keys))
    return found
