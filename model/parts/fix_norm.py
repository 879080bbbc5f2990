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
        return (wide * self.length / self.lengths(m, wide, mean, least=self.eps)).to(x.dtype)
