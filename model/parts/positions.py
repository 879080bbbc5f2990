"""The base of all kinds of positions: each method changes nothing unless a kind says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from triplane.model.part import Part
from triplane.model.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import PositionsModule

Tables = tuple["Tensor", ...]
"""Tensors that all layers with the same positions share in one forward pass."""


class Positions(Part):
    """How the network learns where a token stands."""

    every_stage: ClassVar[bool] = False
    """True: all layers read its weights, so each pipeline stage holds a copy."""
    in_embedding: ClassVar[bool] = False
    """True: it is added to the embeddings, so single layers cannot have it."""
    by_head: ClassVar[bool] = False
    """True: it differs between heads, so all layers have the same number of them."""

    def problems(self, dim: int, head_dim: int) -> Iterator[str]:
        """Yields what is wrong with a stream and heads of these widths."""
        yield from ()

    @property
    def limit(self) -> int | None:
        """The longest sequence that it can number; None: any."""
        return None

    def weights(self, dim: int, n_heads: int) -> Iterator[Weight]:
        yield from ()

    def embed(self, m: PositionsModule, x_TD: Tensor, positions_T: Tensor) -> Tensor:
        """Returns the embeddings with their positions."""
        return x_TD

    def tables(self, m: PositionsModule, positions_T: Tensor, longest: int) -> Tables:
        """Returns what `rotate` and `bias` read; no segment is longer than `longest` tokens."""
        return ()

    def rotate(self, x_THK: Tensor, tables: Tables) -> Tensor:
        """Returns queries or keys with their positions."""
        return x_THK

    def bias(self, tables: Tables) -> Tensor | None:
        """Returns what to add to the scores by query head and distance, (H, longest), fp32."""
        return None

    def build(self, dim: int, n_heads: int, head_dim: int) -> PositionsModule:
        from triplane.model.modules import PositionsModule

        return PositionsModule(self, self.weights(dim, n_heads), n_heads=n_heads, head_dim=head_dim)
