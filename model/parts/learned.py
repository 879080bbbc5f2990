"""Learned positions (Gehring et al. 2017, as in GPT-2): a vector for each, added to the embedding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import NonNegativeInt, PositiveInt

from triplane.model.parts.positions import Positions
from triplane.model.weights import Axis, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import PositionsModule


class LearnedPositions(Positions):
    """A table with a row for each position."""

    in_embedding: ClassVar[bool] = True
    kind: Literal["learned"] = "learned"
    """Learned positions."""
    max_seq_len: PositiveInt
    """Tokens of the longest sequence."""
    offset: NonNegativeInt = 0
    """Rows of the table before that of position 0; OPT has 2."""

    @property
    def limit(self) -> int | None:
        return self.max_seq_len

    def weights(self, dim: int, n_heads: int) -> Iterator[Weight]:
        axes = (Axis("position", self.max_seq_len + self.offset), Axis("dim", dim))
        yield Weight("weight", axes, "normal", "table")

    def embed(self, m: PositionsModule, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        from torch.nn.functional import embedding

        return x_TD + embedding(positions_T + self.offset, m.use("weight"))
