"""ScaleNorm (Nguyen and Salazar 2019, section 3.2): one learned length for all vectors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from triplane.model.parts.norm import Mean, Norm
from triplane.model.weights import Axis, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import NormModule


class ScaleNorm(Norm):
    """g x / max(|x|, eps); g starts at sqrt(dim)."""

    kind: Literal["scale"] = "scale"
    """ScaleNorm."""
    eps: PositiveFloat = 1e-5
    """The least length to divide by."""

    def weights(self, *axes: Axis) -> Iterator[Weight]:
        yield Weight("weight", (Axis("gain", 1),), axes[-1].size ** 0.5, "vector")

    def forward(self, m: NormModule, x: Tensor, mean: Mean | None) -> Tensor:
        wide = x.float()
        return (wide * m.use("weight").float() / self.lengths(m, wide, mean, least=self.eps)).to(x.dtype)
