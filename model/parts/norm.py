"""The base of all norms."""

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

    @staticmethod
    def lengths(m: NormModule, x: Tensor, mean: Mean | None, *, least: float) -> Tensor:
        """Returns the Euclidean length of the last dim, which stays with size 1; at least `least`."""
        squares = x.square()
        square = squares.sum(-1, keepdim=True) if mean is None else mean(squares) * m.axes[-1].size
        return square.clamp(min=least**2).sqrt()  # in this order, since the root's slope at 0 is infinite

    def build(self, *axes: Axis) -> NormModule:
        from triplane.model.modules import NormModule

        return NormModule(self, axes)
