"""Whether boxes cover a tensor: each element once, none twice, nothing outside."""

from collections import Counter
from collections.abc import Iterable
from itertools import product

Dims = tuple[int, ...]


def tiles(shape: Dims, boxes: Iterable[tuple[Dims, Dims]]) -> bool:
    """True if the boxes, each its offsets and sizes, tile a tensor of `shape`.

    A box is told by its corners, with the sign of the mixed difference of its indicator function there. These
    functions add up to that of the whole just if their signed corners do, which takes a pass over the boxes.
    """
    corners: Counter[Dims] = Counter()
    for weight, (offsets, sizes) in [(-1, ((0,) * len(shape), shape)), *((1, box) for box in boxes)]:
        for ends in product((0, 1), repeat=len(shape)):
            corner = tuple(offset + size * end for offset, size, end in zip(offsets, sizes, ends))
            corners[corner] += weight * (-1) ** sum(ends)
    return not any(corners.values())
