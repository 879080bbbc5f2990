"""Describes the ranks as a mesh of four axes."""

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """This rank's place along one axis. `group` may be None on a one-rank axis."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Spread:
    """The ranks that hold the same parameters: they sum gradients, and share the optimizer's state."""

    holders: Axis
    """All of them."""
    shards: Axis
    """Neighbours, of which each updates a share of the parameters."""
    copies: Axis
    """The ranks that update the same share."""


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
    """dp x cp: the ranks with the same weights, over which gradients are averaged."""
    spread: Spread
    """How these share the state of the optimizer."""
    model: ProcessGroup | None
    """The tp x pp ranks that together hold one replica of the model."""
    embedding: ProcessGroup | None
    """The first and last stage, which may both hold the embedding; None on other stages and without a pipeline."""
    ep: Axis = Axis()
    """Neighbours among the replicas, of which each holds a share of the experts."""
    expert_spread: Spread | None = None
    """The ranks that hold the same experts; None if all replicas do."""

    @classmethod
    def of_one(cls, device: torch.device) -> "Mesh":
        """Returns the mesh of a process without peers."""
        one = Axis()
        return cls(
            device=device,
            rank=0,
            world_size=1,
            tp=one,
            pp=one,
            cp=one,
            dp=one,
            replicas=one,
            spread=Spread(one, one, one),
            model=None,
            embedding=None,
        )

    @property
    def first_stage(self) -> bool:
        return self.pp.rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp.rank == self.pp.size - 1
