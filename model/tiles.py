"""Tiles of scores: a block of queries against a block of keys, without those that the rule hides.

Mask and bias depend on a query's distance from a key alone, so they are one vector, of which each row of a tile holds a
part, one place further than the row above. Shapes are those of blocked.py, with M distances of a tile.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_QUERIES, _KEYS = 128, 512
"""Sides of a tile, at most."""


class Span(NamedTuple):
    """Runs of queries, each against its run of keys; in a tensor the runs follow one another."""

    queries: slice
    keys: slice
    distance: int = 0
    """The place of a run's first query, less that of its first key."""
    runs: int = 1


def spans_within(bounds: Sequence[int]) -> list[Span]:
    """Returns each segment against itself; neighbours of one length are runs of one span."""
    spans = []
    for length, segments in groupby(pairwise(bounds), key=lambda segment: segment[1] - segment[0]):
        starts = [start for start, _ in segments]
        if length:
            tokens = slice(starts[0], starts[-1] + length)
            spans.append(Span(tokens, tokens, runs=len(starts)))
    return spans


class Tile(NamedTuple):
    keys: slice
    """In a run."""
    rows: int
    """Queries."""
    distance: int
    """Distance of the first query from the first key."""

    @property
    def columns(self) -> int:
        return self.keys.stop - self.keys.start

    @property
    def farthest(self) -> int:
        """The last query's distance from the first key; `rows + columns - 1` distances end with it."""
        return self.distance + self.rows - 1


def largest(queries: int, keys: int) -> int:
    """Returns the scores of the largest tile of a run."""
    return min(queries, _QUERIES) * min(keys, _KEYS)


def blocks(span: Span, window: int | None) -> Iterator[tuple[slice, list[Tile]]]:
    """Yields blocks of a run's queries, with tiles over the keys that some of them see."""
    queries, keys = ((x.stop - x.start) // span.runs for x in (span.queries, span.keys))
    for start in range(0, queries, _QUERIES):
        stop = min(start + _QUERIES, queries)
        nearest = min(stop + span.distance, keys)
        farthest = 0 if window is None else max(start + span.distance - window + 1, 0)
        tiles = [
            Tile(slice(key, min(key + _KEYS, nearest)), stop - start, start + span.distance - key)
            for key in range(farthest, nearest, _KEYS)
        ]
        yield slice(start, stop), tiles


def edges(tile: Tile, window: int | None) -> Iterator[Tile]:
    """Yields the parts of a tile, whole columns, in which some query does not see some key."""
    near = max(tile.distance + 1, 0)
    if near < tile.columns:
        yield Tile(slice(tile.keys.start + near, tile.keys.stop), tile.rows, tile.distance - near)
    if window is not None and tile.farthest >= window:
        far = min(tile.farthest + 1 - window, tile.columns)
        yield Tile(slice(tile.keys.start, tile.keys.start + far), tile.rows, tile.distance)


def by_distance(tile: Tile, window: int | None, bias_RL: Tensor) -> Tensor:
    """Returns what is added to a tile's scores, (R, rows, columns): the bias, and -inf where the rule hides the key."""
    distance_M = torch.arange(tile.farthest, tile.distance - tile.columns, -1, device=bias_RL.device)
    hidden_M = distance_M < 0 if window is None else (distance_M < 0) | (distance_M >= window)
    added_RM = bias_RL[:, distance_M.clamp(0, bias_RL.shape[1] - 1)]
    return added_RM.masked_fill_(hidden_M, -math.inf).unfold(-1, tile.columns, 1).flip(-2)


def add_diagonals(dbias_RL: Tensor, dscore: Tensor, tile: Tile) -> None:
    """Adds the sum over each diagonal of a tile to the bias of that distance; hidden scores have no gradient."""
    dscore_RQS = dscore.view(len(dscore), tile.rows, -1, tile.columns).sum(0).transpose(0, 1)
    distances = tile.rows + tile.columns - 1
    # Rows one place shorter than those of the buffer put a diagonal into a column.
    skewed = dscore.new_zeros(len(dscore_RQS), tile.rows, distances)
    strides = (tile.rows * distances, distances - 1, 1)
    skewed.as_strided(dscore_RQS.shape, strides, tile.rows - 1).copy_(dscore_RQS)
    sums_RM = skewed.sum(1).flip(-1)  # from the nearest distance on, which may be negative
    nearest = tile.farthest + 1 - distances
    seen = max(nearest, 0)
    dbias_RL[:, seen : tile.farthest + 1] += sums_RM[:, seen - nearest :]
