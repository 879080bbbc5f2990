"""The ranks as a mesh of four axes, and the process groups along each.

Neighbouring ranks share a machine, so tp and cp, which communicate in every layer, vary fastest; then dp,
which communicates once a step; then pp, which sends only activations between stages.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import HashStore, ProcessGroup, Store  # type: ignore[attr-defined]

from triplane.parallel.config import ParallelConfig
from triplane.parallel.errors import LayoutError
from triplane.parallel.groups import Groups, peers

_BACKENDS = {"cuda": "nccl", "cpu": "gloo", "meta": "cpu:fake,meta:fake"}
"""By device. On meta, where tensors have no content, collectives do nothing; `store` is then a FakeStore."""


@dataclass(frozen=True)
class Axis:
    """This rank's place along one axis. `group` may be None where the axis has one rank."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the layout."""

    device: torch.device
    rank: int
    world_size: int
    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    replicas: Axis
    """dp x cp: the ranks with the same weights, over which gradients are averaged and ZeRO shards."""
    model: ProcessGroup | None
    """The tp x pp ranks that together hold one replica of the model."""
    embedding: ProcessGroup | None
    """First and last stage, which share a tied embedding; None on the others and without a pipeline."""

    @property
    def first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1


@contextmanager
def connected(
    config: ParallelConfig, device: torch.device, rank: int, world_size: int, store: Store | None = None
) -> Iterator[Mesh]:
    """Joins the process groups, and leaves them at the end of the block unless it raised.

    `store` None: the rendezvous that MASTER_ADDR and MASTER_PORT name. After an error the peers may
    hang in a collective, so the groups are left to the end of the process.
    """
    if store is None and world_size == 1:
        store = HashStore()
    # With a device, NCCL connects at once, but all ranks would then have to take part in making each group.
    alone = config.ranks_of_one == 1
    dist.init_process_group(
        _BACKENDS[device.type],
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=config.timeout_s),
        device_id=device if device.type == "cuda" and alone else None,
    )
    yield _mesh(config, device, rank, world_size)
    dist.destroy_process_group()


def _mesh(config: ParallelConfig, device: torch.device, rank: int, world_size: int) -> Mesh:
    one = config.ranks_of_one
    dp = world_size // one if config.dp == "auto" else config.dp
    if dp * one != world_size:
        raise LayoutError(
            f"dp ({config.dp}) x tp ({config.tp}) x pp ({config.pp}) x cp ({config.cp}) does not make {world_size} "
            f"ranks; set parallel.dp to {max(1, world_size // one)} or start {max(1, dp) * one} ranks"
        )
    if one == 1:
        alone, all_ranks = Axis(), Axis(dp, rank, dist.group.WORLD)
        return Mesh(device, rank, world_size, alone, alone, alone, all_ranks, all_ranks, None, None)
    mesh = _split(config, device, rank, world_size, dp)
    from triplane.parallel import megatron  # 3 s to import: only where there is something to split

    megatron.use_groups_of(mesh)
    return mesh


def _split(config: ParallelConfig, device: torch.device, rank: int, world_size: int, dp: int) -> Mesh:
    """The mesh of a layout in which several ranks hold one model."""
    sizes = {"tp": config.tp, "cp": config.cp, "dp": dp, "pp": config.pp}
    groups = Groups(timedelta(seconds=config.timeout_s))

    def axis(*along: str) -> Axis:
        ranks = peers(rank, sizes, set(along))
        return Axis(len(ranks), ranks.index(rank), groups.of(ranks))

    tp, cp, dp_axis, pp = axis("tp"), axis("cp"), axis("dp"), axis("pp")
    replicas, model = axis("dp", "cp"), axis("tp", "pp").group
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
        model=model,
        embedding=embedding,
    )
