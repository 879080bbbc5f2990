"""Finds ranks with memory or arithmetic errors: weights that should be bitwise equal and are not."""

from collections import Counter
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from triplane.parallel.engine import Engine
from triplane.parallel.mesh import Axis, Mesh

_INTEGERS = {2: torch.int16, 4: torch.int32}
"""By element size in bytes."""


def differing_ranks(engine: Engine) -> list[int]:
    """Returns the ranks whose weights differ from those of most of their replicas; collective.

    With two replicas, returns both. At ZeRO 3 the replicas are those of a shard.
    """
    mesh, placements = engine.mesh, engine.local.placements
    sharded = engine.layout.shards_weights(mesh.replicas.size)
    differs = False
    for spread in dict.fromkeys(placement.spread for placement in placements):
        alike = [placement.parameter.detach() for placement in placements if placement.spread is spread]
        differs |= _differs(alike, spread.copies if sharded else spread.holders, mesh.device)
    return ranks_where(mesh, differs)


def _differs(parameters: list[Tensor], replicas: Axis, device: torch.device) -> bool:
    """Returns whether this rank's parameters differ from those of most of `replicas`, or nobody's are most."""
    if replicas.size == 1:
        return False
    weights = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]
    mine = checksum(weights, device)
    theirs = [torch.empty_like(mine) for _ in range(replicas.size)]
    dist.all_gather(theirs, mine, group=replicas.group)
    sums = [int(other) for other in theirs]
    most, count = Counter(sums).most_common(1)[0]
    return int(mine) != most or count * 2 <= len(sums)


def ranks_where(mesh: Mesh, true: bool) -> list[int]:
    """Returns the ranks on which `true` holds, the same list on all; collective."""
    flags = torch.zeros(mesh.world_size, dtype=torch.int32, device=mesh.device)
    flags[mesh.rank] = true
    dist.all_reduce(flags)
    return flags.nonzero().flatten().tolist()


def checksum(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Returns an int64 that changes with any single bit of fp32 or bf16 tensors."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for number, tensor in enumerate(tensors, start=1):
        bits = tensor.contiguous().view(_INTEGERS[tensor.element_size()])
        total += number * bits.sum(dtype=torch.int64).to(device)  # offloaded state is on the host
    return total
