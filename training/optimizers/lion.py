"""Lion (Chen et al. 2023): steps by signs, and keeps one moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from triplane.model.weights import Weight
from triplane.training.optimizers.optimizer import Optimizer

if TYPE_CHECKING:
    import torch

    from triplane.parallel.mesh import Mesh
    from triplane.parallel.update import Each, Piece


class Lion(Optimizer):
    """Lion (Chen et al. 2023): half the state of AdamW, a third to a tenth of its rate, and as much more decay."""

    kind: Literal["lion"]
    """Lion."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Share of the moment in a step's direction."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the moment."""

    def moments(self, weight: Weight) -> Mapping[str, Each]:
        return {"exp_avg": "element"}

    def build(self, pieces: Sequence[Piece], mesh: Mesh) -> list[torch.optim.Optimizer]:
        from triplane.training.optimizers.own_update import LionUpdate

        groups = self.grouped(self.described(pieces))
        return [LionUpdate(groups, beta1=self.beta1, beta2=self.beta2)]
