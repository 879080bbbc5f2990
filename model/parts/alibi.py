"""ALiBi (Press, Smith and Lewis 2022): scores fall with distance, at another slope in each head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from triplane.model.parts.positions import Positions, Tables

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.modules import PositionsModule


class Alibi(Positions):
    """Adds -slope x distance to the scores, in fp32."""

    by_head: ClassVar[bool] = True
    kind: Literal["alibi"] = "alibi"
    """ALiBi."""
    max_bias: PositiveFloat = 8.0
    """The smallest of n slopes is 2^-max_bias."""

    def tables(self, m: PositionsModule, positions_T: Tensor, longest: int) -> Tables:
        import torch

        slopes = alibi_slopes(m.n_heads, self.max_bias)[m.heads]
        slopes_H = torch.tensor(slopes, dtype=torch.float32, device=positions_T.device)
        return (-slopes_H[:, None] * torch.arange(longest, device=positions_T.device),)

    def bias(self, tables: Tables) -> Tensor | None:
        return tables[0]


def alibi_slopes(n_heads: int, max_bias: float) -> list[float]:
    """Returns 2^(-max_bias i / n) for i = 1 to n if n is a power of two.

    Otherwise, with the next power of two: every second slope from the second on, then from the first on.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    slopes = [2 ** (-max_bias * i / power) for i in range(1, power + 1)]
    return slopes if power == n_heads else (slopes[1::2] + slopes[::2])[:n_heads]
