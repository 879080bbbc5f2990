"""The config table `[optimizer]`: how weights are updated. Imports torch only to build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from triplane.parallel.update import Described, Piece


class OptimizerConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True):
    """AdamW (Loshchilov and Hutter 2019)."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices, not to norms."""
    grad_clip: PositiveFloat = 1.0
    """Maximum global gradient norm."""

    def moments(self, weight: Described) -> tuple[str, ...]:
        """Returns the names of the tensors that an update of `weight` keeps."""
        return ("exp_avg", "exp_avg_sq")

    def build(self, pieces: Sequence[Piece]) -> torch.optim.Optimizer:
        """Builds the optimizer of `pieces`."""
        return adamw(self, ((piece.weight, piece.placement.role) for piece in pieces))


def adamw(config: OptimizerConfig, weights: Iterable[tuple[Tensor, str]]) -> torch.optim.AdamW:
    """Builds AdamW of weights, each with its role; the training loop sets the learning rate at each step."""
    import torch

    return torch.optim.AdamW(
        decay_groups(weights),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def decay_groups(weights: Iterable[tuple[Tensor, str]]) -> list[dict[str, Any]]:
    """Returns parameter groups by the roles that come with the weights: matrices and tables, with weight decay, and
    vectors (norms, biases), without; a network without vectors has one group.
    """
    decayed: list[Tensor] = []
    vectors: list[Tensor] = []
    for weight, role in weights:
        (vectors if role == "vector" else decayed).append(weight)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
