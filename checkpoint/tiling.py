"""Checks that boxes tile a tensor: each element once, nothing outside."""

from collections import Counter
from collections.abc import Iterable
from itertools import product

Dims = tuple[int, ...]


def tiles(shape: Dims, boxes: Iterable[tuple[Dims, Dims]]) -> bool:
    """Returns True if the boxes, given as (offsets, sizes), tile a tensor of `shape`.

    The corners of a box, signed by the mixed difference of its indicator function there, determine it. The indicator
    functions sum to that of the whole if and only if the signed corners do, which takes one pass over the boxes.
    """
    corners: Counter[Dims] = Counter()
    for weight, (offsets, sizes) in [(-1, ((0,) * len(shape), shape)), *((1, box) for box in boxes)]:
        for ends in product((0, 1), repeat=len(shape)):
            corner = tuple(offset + size * end for offset, size, end in zip(offsets, sizes, ends))
            corners[corner] += weight * (-1) ** sum(ends)
    return not any(corners.values())
