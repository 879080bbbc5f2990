"""The base of all feed-forward parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from triplane.model.part import Part
from triplane.model.weights import Cost, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import PartModule


class FeedForward(Part):
    """Works on each token alone."""

    def weights(self, dim: int) -> Iterator[Weight]:
        raise NotImplementedError

    def cost(self, dim: int) -> Cost:
        raise NotImplementedError

    def forward(self, m: PartModule, x_TD: Tensor) -> Tensor:
        raise NotImplementedError

    def build(self, dim: int) -> PartModule:
        from triplane.model.modules import PartModule

        return PartModule(self, self.weights(dim))
