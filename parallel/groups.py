"""Connects the ranks of a run, and creates the process groups along each axis of their mesh.

Neighbouring ranks share a machine, so tp and cp, which communicate in every layer, vary fastest; then dp, which
communicates once per step; then pp, which sends only activations between stages.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, ProcessGroup, Store  # type: ignore[attr-defined]

from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Axis, Mesh, Spread
from triplane.storage.errors import LayoutError

_BACKENDS = {"cuda": "nccl", "cpu": "gloo", "meta": "cpu:fake,meta:fake"}
"""Per device. On meta, where tensors have no content, collectives do nothing and `store` is a FakeStore."""


@contextmanager
def connected(
    config: ParallelConfig, device: torch.device, *, rank: int, world_size: int, store: Store | None = None
) -> Iterator[Mesh]:
    """Joins the process groups, and leaves them at the end of the block unless it raised.

    Without a `store`, uses the rendezvous at MASTER_ADDR and MASTER_PORT. After an error the peers may hang in a
    collective, so the groups stay until the process ends.
    """
    if store is None and world_size == 1:
        store = HashStore()
    # With a device NCCL connects at once, but then all ranks must take part in creating each group.
    alone = config.ranks_of_one == config.ep == 1 and config.dp_shard is None
    dist.init_process_group(
        _BACKENDS[device.type],
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=config.timeout_s),
        device_id=device if device.type == "cuda" and alone else None,
    )
    yield _mesh(config, device, rank=rank, world_size=world_size)
    dist.destroy_process_group()


def _mesh(config: ParallelConfig, device: torch.device, *, rank: int, world_size: int) -> Mesh:
    one = config.ranks_of_one
    dp = world_size // one if config.dp == "auto" else config.dp
    if dp * one != world_size:
        raise LayoutError(
            f"dp ({config.dp}) x tp ({config.tp}) x pp ({config.pp}) x cp ({config.cp}) does not make {world_size} "
            f"ranks; set parallel.dp to {max(1, world_size // one)} or start {max(1, dp) * one} ranks"
        )
    if dp * config.cp % config.ep:
        raise LayoutError(f"ep ({config.ep}) does not divide dp ({dp}) x cp ({config.cp}); set parallel.ep=1")
    if config.dp_shard and dp * config.cp % config.dp_shard:
        raise LayoutError(f"dp_shard ({config.dp_shard}) does not divide dp ({dp}) x cp ({config.cp})")
    groups = Groups(timedelta(seconds=config.timeout_s))
    if one == 1:
        alone, all_ranks = Axis(), Axis(dp, rank, dist.group.WORLD)
        return Mesh(
            device=device,
            rank=rank,
            world_size=world_size,
            tp=alone,
            pp=alone,
            cp=alone,
            dp=all_ranks,
            replicas=all_ranks,
            spread=_spread(config.shards(dp), all_ranks, list(range(dp)), groups),
            model=None,
            embedding=None,
            **_experts(config, groups, list(range(world_size)), rank),
        )
    mesh = _split(config, device, rank=rank, world_size=world_size, dp=dp, groups=groups)
    from triplane.parallel import megatron  # takes 3 s to import, so only where a model is split

    megatron.use_groups_of(mesh)
    return mesh


def _split(
    config: ParallelConfig, device: torch.device, *, rank: int, world_size: int, dp: int, groups: "Groups"
) -> Mesh:
    """Returns the mesh of a layout in which several ranks hold one model."""
    sizes = {"tp": config.tp, "cp": config.cp, "dp": dp, "pp": config.pp}

    def axis(*along: str) -> Axis:
        ranks = peers(rank, sizes, set(along))
        return Axis(len(ranks), ranks.index(rank), groups.of(ranks))

    tp, cp, dp_axis, pp = axis("tp"), axis("cp"), axis("dp"), axis("pp")
    replicas, alike, model = axis("dp", "cp"), peers(rank, sizes, {"dp", "cp"}), axis("tp", "pp").group
    stages = peers(rank, sizes, {"pp"})
    ends = [stages[0], stages[-1]]
    embedding = groups.of(ends) if config.pp > 1 and rank in ends else None
    return Mesh(
        device=device,
        rank=rank,
        world_size=world_size,
        tp=tp,
        pp=pp,
        cp=cp,
        dp=dp_axis,
        replicas=replicas,
        spread=_spread(config.shards(replicas.size), replicas, alike, groups),
        model=model,
        embedding=embedding,
        **_experts(config, groups, alike, rank),
    )


def _spread(size: int, holders: Axis, ranks: list[int], groups: "Groups") -> Spread:
    """Divides the `ranks` of an axis into `size` neighbours that share a state, and copies of it."""
    number = holders.rank
    if size == holders.size:
        return Spread(holders, shards=holders, copies=Axis())
    if size == 1:
        return Spread(holders, shards=Axis(), copies=holders)
    first = number - number % size
    shards = Axis(size, number % size, groups.of(ranks[first : first + size]))
    copies = Axis(holders.size // size, number // size, groups.of(ranks[number % size :: size]))
    return Spread(holders, shards, copies)


def _experts(config: ParallelConfig, groups: "Groups", replicas: list[int], rank: int) -> dict[str, Any]:
    """Returns the axis of ranks that together hold the experts, and the spread of those that hold the same."""
    if config.ep == 1:
        return {}

    def axis(ranks: list[int]) -> Axis:
        return Axis(len(ranks), ranks.index(rank), groups.of(ranks)) if len(ranks) > 1 else Axis()

    start = replicas.index(rank) // config.ep * config.ep
    alike = replicas[replicas.index(rank) % config.ep :: config.ep]
    spread = _spread(config.expert_shards(len(replicas)), axis(alike), alike, groups)
    return {"ep": axis(replicas[start : start + config.ep]), "expert_spread": spread}


class Groups:
    """Creates only the groups that a layout uses, since each is a communicator with its own GPU memory.

    Returns the same group for the same ranks. Only members call, all in the same order, so the number of groups on a
    rank does not grow with the number of ranks.
    """

    def __init__(self, timeout: timedelta):
        """`timeout` is how long a collective waits for a rank."""
        self._timeout = timeout
        self._made: dict[tuple[int, ...], ProcessGroup] = {}

    def of(self, ranks: Iterable[int]) -> ProcessGroup:
        """Returns the group of `ranks`, which include this rank."""
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
    """Returns the ranks that share this rank's coordinates on all axes but those in `along`, ascending.

    `sizes` maps each axis to its size; the first axis varies fastest.
    """
    found, stride = [0], 1
    for axis, size in sizes.items():
        places = range(size) if axis in along else [rank // stride % size]
        found = [rest + place * stride for place in places for rest in found]
        stride *= size
    return found
