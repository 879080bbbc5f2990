"""Updates that torch has not, or not for shards: Muon and Lion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triplane.model.weights import Weight
from triplane.parallel.whole import WholeMatrices


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
    """w -= lr (orthogonal(direction) + decay w), with the momentum or its Nesterov form as the direction."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        wholes: WholeMatrices,
        orthogonal: Callable[[Weight, Tensor], Tensor],
        *,
        momentum: float,
        nesterov: bool,
    ):
        super().__init__(groups)
        self.wholes = wholes
        self.orthogonal = orthogonal
        self.momentum, self.nesterov = momentum, nesterov

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        weights = [piece.weight for piece in self.wholes.pieces]
        steps = self.wholes.map(self.orthogonal, [self._direction(weight) for weight in weights])
        by_weight = {id(weight): step for weight, step in zip(weights, steps)}
        for group in self.param_groups:
            for weight in group["params"]:
                self.descend(group, weight, by_weight[id(weight)])

    def _direction(self, weight: Tensor) -> Tensor:
        gradient, moment = self.gradient(weight), self.state[weight]["momentum"]
        moment.lerp_(gradient, (1 - self.momentum) * self.taken)
        return torch.lerp(gradient, moment, self.momentum) if self.nesterov else moment
