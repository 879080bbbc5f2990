"""FixNorm (Nguyen and Chiang 2018): vectors of a fixed length, such as unit embeddings times a constant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from triplane.model.parts.norm import Mean, Norm

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import NormModule


class FixNorm(Norm):
    """length x / max(|x|, eps); without weights."""

    kind: Literal["fix"] = "fix"
    """FixNorm."""
    length: PositiveFloat = 1.0
    """The length of each vector."""
    eps: PositiveFloat = 1e-5
    """The least length to divide by."""

    def forward(self, m: NormModule, x: Tensor, mean: Mean | None) -> Tensor:
        wide = x.float()
        squares = wide.square()
        square = squares.sum(-1, keepdim=True) if mean is None else mean(squares) * m.axes[-1].size
        length = square.clamp(min=self.eps**2).sqrt()  # in this order, since the root's slope at 0 is infinite
        return (wide * self.length / length).to(x.dtype)
