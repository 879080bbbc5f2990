"""Updates that torch has not, or not for shards: Muon and Lion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from triplane.model.weights import Weight
from triplane.parallel.whole import WholeMatrices

_EPS = 1e-10
"""Added to the root of a row's second moment."""


class OwnUpdate(torch.optim.Optimizer):
    """Divides gradients by `grad_scale` and, if `found_inf` is 1, changes nothing: without a wait of the host."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"lr": 0.0})
        self.grad_scale, self.found_inf = torch.ones(()), torch.zeros(())

    def gradient(self, weight: Tensor) -> Tensor:
        """Returns the clipped gradient; zeros if any is not finite."""
        assert weight.grad is not None, "every parameter takes part in every step"
        return torch.where(self.found_inf.bool(), 0, weight.grad / self.grad_scale)

    @property
    def taken(self) -> Tensor:
        """1 if the step is taken, else 0."""
        return 1 - self.found_inf

    def descend(self, group: dict[str, Any], weight: Tensor, direction: Tensor, scale: float = 1.0) -> None:
        """Decays `weight` and moves it against `direction`, `scale` times the group's rate."""
        rate = group["lr"] * self.taken
        weight.mul_(1 - rate * group["weight_decay"]).sub_(direction * (scale * rate))


class LionUpdate(OwnUpdate):
    """w -= lr (sign(beta1 m + (1 - beta1) g) + decay w), then m = beta2 m + (1 - beta2) g (Chen et al. 2023)."""

    def __init__(self, groups: list[dict[str, Any]], *, beta1: float, beta2: float):
        super().__init__(groups)
        self.beta1, self.beta2 = beta1, beta2

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                gradient, moment = self.gradient(weight), self.state[weight]["exp_avg"]
                self.descend(group, weight, torch.lerp(gradient, moment, self.beta1).sign())
                moment.lerp_(gradient, (1 - self.beta2) * self.taken)


class MuonUpdate(OwnUpdate):
    """w -= lr (orthogonal(direction) + decay w), with the momentum or its Nesterov form as the direction.

    With `second_moment_decay`, b, the orthogonal factor O becomes that of NorMuon (Li et al. 2025): v is b v + (1 - b)
    mean(O O) of each row, and O / sqrt(v) is scaled to the norm of O, of each matrix if there are several.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        wholes: WholeMatrices,
        orthogonal: Callable[[Weight, Tensor], Tensor],
        *,
        momentum: float,
        nesterov: bool,
        second_moment_decay: float | None,
    ):
        super().__init__(groups)
        self.wholes = wholes
        self.orthogonal = orthogonal
        self.momentum, self.nesterov = momentum, nesterov
        self.second_moment_decay = second_moment_decay

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        weights = [piece.weight for piece in self.wholes.pieces]
        steps = self.wholes.map(self.orthogonal, [self._direction(weight) for weight in weights])
        if self.second_moment_decay is not None:
            self._normalise_rows(steps, self.second_moment_decay)
        by_weight = {id(weight): step for weight, step in zip(weights, steps)}
        for group in self.param_groups:
            for weight in group["params"]:
                self.descend(group, weight, by_weight[id(weight)])

    def _direction(self, weight: Tensor) -> Tensor:
        gradient, moment = self.gradient(weight), self.state[weight]["momentum"]
        moment.lerp_(gradient, (1 - self.momentum) * self.taken)
        return torch.lerp(gradient, moment, self.momentum) if self.nesterov else moment

    def _normalise_rows(self, steps: Sequence[Tensor], decay: float) -> None:
        """Changes `steps` in place. The norms of matrices follow from the mean squares of their rows."""
        pieces = self.wholes.pieces
        rows = [step.view(piece.shape) for piece, step in zip(pieces, steps)]
        squares = [row.square().sum(-1) for row in rows]
        self.wholes.sum_over_columns(squares)
        factors, norms = [], []
        for piece, square in zip(pieces, squares):
            moment = self.state[piece.weight]["second_moment"]
            moment.lerp_(square / piece.placement.shape[-1], (1 - decay) * self.taken)
            factors.append(1 / (moment.sqrt() + _EPS))
            norms.append(torch.stack((square.sum(-1), (square * factors[-1].square()).sum(-1))))
        self.wholes.sum_over_rows(norms)
        for row, factor, (before, after) in zip(rows, factors, norms):
            length = (before / after.clamp(min=torch.finfo(after.dtype).tiny)).sqrt()
            row.mul_((factor * length[..., None])[..., None])
