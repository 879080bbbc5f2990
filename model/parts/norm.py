"""What all norms have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from triplane.model.part import Part
from triplane.model.weights import Axis, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import NormModule

Mean = Callable[["Tensor"], "Tensor"]
"""Averages over the last dim, which stays with size 1, including the shares of other ranks."""


class Norm(Part):
    """Normalizes the last dim."""

    def weights(self, *axes: Axis) -> Iterator[Weight]:
        """Yields the weights of a norm over the last of `axes`."""
        yield from ()

    def forward(self, m: NormModule, x: Tensor, mean: Mean | None) -> Tensor:
        """Returns the normalized x, in x's dtype. With `mean` the last dim is split over ranks."""
        raise NotImplementedError

    def build(self, *axes: Axis) -> NormModule:
        from triplane.model.modules import NormModule

        return NormModule(self, axes)
