"""T5's relative positions (Raffel et al. 2020, section 2.1): a learned bias for each head and bucket of distances."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from triplane.model.parts.positions import Positions, Tables
from triplane.model.weights import Axis, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import PositionsModule


class RelativePositions(Positions):
    """One table for all layers. Half of the buckets hold one distance each, the rest grow logarithmically."""

    every_stage: ClassVar[bool] = True
    by_head: ClassVar[bool] = True
    kind: Literal["relative"] = "relative"
    """T5's relative positions."""
    buckets: int = Field(default=32, ge=2)
    """Rows of the table."""
    max_distance: PositiveInt = 128
    """Tokens; longer distances share the last bucket."""

    @model_validator(mode="after")
    def _growing(self) -> RelativePositions:
        if self.max_distance <= self.buckets // 2:
            raise ValueError(f"max_distance ({self.max_distance}) must be over half of buckets ({self.buckets})")
        return self

    def weights(self, dim: int, n_heads: int) -> Iterator[Weight]:
        yield Weight("weight", (Axis("head", n_heads), Axis("bucket", self.buckets)), "normal", "table")

    def tables(self, m: PositionsModule, positions_T: Tensor, longest: int) -> Tables:
        import torch

        distances = torch.arange(longest, device=positions_T.device)
        return (m.use("weight").float()[:, self._bucket(distances)],)

    def bias(self, tables: Tables) -> Tensor | None:
        return tables[0]

    def _bucket(self, distances: Tensor) -> Tensor:
        exact = self.buckets // 2
        growth = (distances.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact)
        far = exact + (growth * (self.buckets - exact)).long()
        return distances.where(distances < exact, far.clamp(max=self.buckets - 1))
