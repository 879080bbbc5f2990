"""Finds ranks whose memory or arithmetic errs: weights that should be the same bits and are not."""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from triplane.parallel.engine import Engine

_INTEGERS = {2: torch.int16, 4: torch.int32}
"""By size of an element."""


def differing_ranks(engine: Engine) -> list[int]:
    """The ranks whose weights are not those of most ranks that should have the same; collective.

    Of two that differ both are named. ZeRO 3 keeps no weight twice, so that none can differ.
    """
    mesh = engine.mesh
    mine = _checksum(engine)
    theirs = [torch.empty_like(mine) for _ in range(mesh.replicas.size)]
    dist.all_gather(theirs, mine, group=mesh.replicas.group)
    sums = [int(one) for one in theirs]
    most, count = Counter(sums).most_common(1)[0]
    alone = int(mine) != most or count * 2 <= len(sums)
    flags = torch.zeros(mesh.world_size, dtype=torch.int32, device=mesh.device)
    flags[mesh.rank] = alone
    dist.all_reduce(flags)
    return flags.nonzero().flatten().tolist()


def _checksum(engine: Engine) -> Tensor:
    """Changes with any bit of this rank's weights; an int64."""
    total = torch.zeros((), dtype=torch.int64, device=engine.mesh.device)
    for number, placement in enumerate(engine.local.placements, start=1):
        weight = placement.parameter.detach()
        bits = weight.contiguous().view(_INTEGERS[weight.element_size()])
        total += number * bits.sum(dtype=torch.int64)
    return total
