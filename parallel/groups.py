"""The process groups that a layout uses, and no others: each is a communicator, with memory of its own on a GPU."""

from collections.abc import Iterable, Mapping
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup


class Groups:
    """Creates groups of ranks; asked again for the same ranks, it returns the same group.

    Only members call, and all of them in the same order, so the number of groups on a rank does not grow with the
    number of ranks.
    """

    def __init__(self, timeout: timedelta):
        """`timeout`: how long a collective waits for a rank."""
        self._timeout = timeout
        self._made: dict[tuple[int, ...], ProcessGroup] = {}

    def of(self, ranks: Iterable[int]) -> ProcessGroup:
        """The group of `ranks`, which this rank is one of."""
        key = tuple(ranks)
        if len(key) == dist.get_world_size():
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        if key not in self._made:
            made = dist.new_group(list(key), timeout=self._timeout, use_local_synchronization=True)
            assert isinstance(made, ProcessGroup), key
            self._made[key] = made
        return self._made[key]


def peers(rank: int, sizes: Mapping[str, int], along: set[str]) -> list[int]:
    """The ranks at this rank's place on all axes but those in `along`, ascending.

    `sizes` gives the size of each axis; the first varies fastest from one rank to the next.
    """
    found, stride = [0], 1
    for axis, size in sizes.items():
        places = range(size) if axis in along else [rank // stride % size]
        found = [rest + place * stride for place in places for rest in found]
        stride *= size
    return found
