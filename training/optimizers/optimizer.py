"""What every kind of optimizer has: rate, decay, clipping. Imports torch only to build.

A kind is one file: a table of the config that says what it keeps of a weight, and builds what updates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat

from triplane.model.weights import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from triplane.parallel.mesh import Mesh
    from triplane.parallel.update import Piece


class Optimizer(BaseModel):
    """Options of every kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices, not to norms."""
    grad_clip: PositiveFloat = 1.0
    """Maximum global gradient norm."""

    def moments(self, weight: Weight) -> tuple[str, ...]:
        """Returns the names of the tensors that an update of `weight` keeps."""
        raise NotImplementedError

    def build(self, pieces: Sequence[Piece], mesh: Mesh) -> list[torch.optim.Optimizer]:
        """Builds optimizers that together update `pieces`."""
        raise NotImplementedError


def decay_groups(weights: Iterable[tuple[Tensor, Weight]], decay: float) -> list[dict[str, Any]]:
    """Returns parameter groups: matrices and tables, with weight decay, and vectors (norms, biases), without.

    A group without parameters is left out.
    """
    decayed: list[Tensor] = []
    vectors: list[Tensor] = []
    for tensor, weight in weights:
        (vectors if weight.role == "vector" else decayed).append(tensor)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return [group for group in groups if group["params"]]
