"""Rows of tokens, one for each expert that a token passes, in the order of the experts.

Each gradient is gathered as its value is, by a permutation, so it is added up in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Slots(NamedTuple):
    """S = T x A rows in the order of their experts, and pairs of token and choice in the order of tokens."""

    experts_S: Tensor
    """The expert of each row, ascending."""
    ends_E: Tensor
    """How many rows are those of an expert or one before it; int32."""
    pair_S: Tensor
    """The pair of each row."""
    row_S: Tensor
    """The row of each pair."""
    active: int

    @classmethod
    def of(cls, experts_TA: Tensor, n_experts: int) -> Slots:
        """Returns the rows of tokens that choose these experts."""
        experts_S, pair_S = experts_TA.flatten().sort(stable=True)
        numbers_E = torch.arange(n_experts, device=experts_S.device)
        ends_E = torch.searchsorted(experts_S, numbers_E, right=True, out_int32=True)
        return cls(experts_S, ends_E, pair_S, row_S=pair_S.argsort(), active=experts_TA.shape[1])

    def marked(self, dtype: torch.dtype) -> Tensor:
        """Returns a 1 for the expert of each row, (S, E)."""
        return (self.experts_S[:, None] == torch.arange(len(self.ends_E), device=self.ends_E.device)).to(dtype)

    def spread(self, x_TD: Tensor) -> Tensor:
        """Returns the rows of tokens, (S, D)."""
        return _Spread.apply(x_TD, self.pair_S, self.row_S, self.active)  # type: ignore[no-untyped-call]

    def combined(self, x_SD: Tensor, weights_TA: Tensor) -> Tensor:
        """Returns for each token the sum of its rows by weight, (T, D)."""
        x_TAD = permuted(x_SD, self.row_S, self.pair_S).view(*weights_TA.shape, -1)
        return (x_TAD * weights_TA[..., None]).sum(1).to(x_SD.dtype)


def permuted(x_SD: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
    """Returns the rows in another order, of which `inverse_S` is the inverse."""
    rows_SD: Tensor = _Permuted.apply(x_SD, order_S, inverse_S)  # type: ignore[no-untyped-call]
    return rows_SD


class Dispatched(NamedTuple):
    """Rows on their way to the ranks of their experts."""

    arrived: Callable[[], Tensor]
    """Waits for those for this rank's experts, (S, D); until then it can compute something else."""
    slots: Slots
    """Of these."""
    back: Callable[[Tensor], Tensor]
    """Takes outputs back to where their rows came from."""


def here(x_SD: Tensor, slots: Slots) -> Dispatched:
    """Returns rows where all experts are on this rank."""
    return Dispatched(lambda: x_SD, slots, lambda out_SD: out_SD)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, pair_S: Tensor, row_S: Tensor, active: int) -> Tensor:
        ctx.save_for_backward(row_S)
        ctx.active = active
        return x_TD[pair_S // active]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        (row_S,) = ctx.saved_tensors
        return grad_SD[row_S].view(-1, ctx.active, grad_SD.shape[1]).sum(1), None, None, None


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_S)
        return x_SD[order_S]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_S,) = ctx.saved_tensors
        return grad_SD[inverse_S], None, None
