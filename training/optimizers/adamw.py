"""AdamW (Loshchilov and Hutter 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat

from triplane.model.weights import Weight
from triplane.training.optimizers.optimizer import Optimizer, decay_groups

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from triplane.parallel.mesh import Mesh
    from triplane.parallel.update import Piece


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    """AdamW."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    def moments(self, weight: Weight) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def build(self, pieces: Sequence[Piece], mesh: Mesh) -> list[torch.optim.Optimizer]:
        return [adamw(self, ((piece.weight, piece.placement.weight) for piece in pieces))]


def adamw(config: AdamW, weights: Iterable[tuple[Tensor, Weight]]) -> torch.optim.AdamW:
    """Builds torch's fused AdamW; the training loop sets the learning rate at each step."""
    import torch

    return torch.optim.AdamW(
        decay_groups(weights, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
