"""The base of all feed-forward parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from triplane.model.part import Part
from triplane.model.weights import Cost, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.batch import Batch
    from triplane.model.modules import PartModule


class FeedForward(Part):
    """Works on each token alone; only losses that it adds to the objective may see others."""

    @property
    def tallied(self) -> int:
        """Values that it counts in training; the first is the sum of the losses that it adds."""
        return 0

    def reported(self, tally: list[float]) -> dict[str, float]:
        """Returns metrics of what a layer counted, given as means over tokens; the worst layer's is the largest."""
        return {}

    def after_step(self, m: PartModule, counts: Tensor, applied: Tensor) -> None:
        """Changes its state by what the layer counted over a global batch; `applied` is 0 if the step was not."""

    def problems(self) -> Iterator[str]:
        """Yields what its keys contradict, a line each with its operands."""
        yield from ()

    def weights(self, dim: int) -> Iterator[Weight]:
        raise NotImplementedError

    def cost(self, dim: int) -> Cost:
        raise NotImplementedError

    def forward(self, m: PartModule, x_TD: Tensor, batch: Batch) -> Tensor:
        raise NotImplementedError

    def build(self, dim: int) -> PartModule:
        from triplane.model.modules import PartModule

        return PartModule(self, self.weights(dim))
