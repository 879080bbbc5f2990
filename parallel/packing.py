"""Packs parameters into buffers that are cut into equal shares: their order, and where each starts.

A buffer is reduced at once: large enough for few collectives, small enough that others overlap with the backward pass.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

BUCKET_ELEMENTS = 32 * 1024**2
"""Least elements of a buffer but the last."""
SHARE_ELEMENTS = 1024**2
"""Least elements of a share, so that no message becomes too small for the network."""
_ALIGNMENT = 64
"""Elements between starts: 128 bytes in bf16, which GPUs read at once."""
_MOST_PADDING = 1 / 8


def least_elements(shares: int) -> int:
    """Returns the least elements of a buffer of so many shares."""
    return max(BUCKET_ELEMENTS, shares * SHARE_ELEMENTS)


class Packed(NamedTuple):
    """Parameters in a buffer."""

    starts: list[int]
    """Of each parameter."""
    share: int
    """Elements of a share."""


def pack(sizes: Sequence[int], shares: int, *, whole: bool) -> Packed:
    """Places parameters of `sizes` elements; a `whole` one lies within a share, others anywhere."""
    sizes = [_aligned(size) for size in sizes]
    if not whole:
        *starts, end = accumulate(sizes, initial=0)
        return Packed(starts, _aligned(-(-end // shares)))
    filled, places = [0] * shares, {}
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):  # the largest first: less padding
        share = filled.index(min(filled))
        places[number] = (share, filled[share])
        filled[share] += sizes[number]
    size = max(filled)
    return Packed([size * places[number][0] + places[number][1] for number in range(len(sizes))], size)


def bucket_runs(sizes: Sequence[int], shares: int, *, whole: bool) -> list[range]:
    """Cuts consecutive parameters into those of each buffer; the last ones join the buffer before if they are few."""
    cuts = [0]
    for stop in range(1, len(sizes) + 1):
        inside = sizes[cuts[-1] : stop]
        if sum(inside) < least_elements(shares):
            continue
        if sum(inside) >= (1 - _MOST_PADDING) * shares * pack(inside, shares, whole=whole).share:
            cuts.append(stop)
    if cuts[-1] < len(sizes):
        cuts[max(1, len(cuts) - 1) :] = [len(sizes)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
