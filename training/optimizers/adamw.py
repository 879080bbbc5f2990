"""AdamW (Loshchilov and Hutter 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat

from triplane.model.weights import Weight
from triplane.training.optimizers.optimizer import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from triplane.parallel.mesh import Mesh
    from triplane.parallel.update import Each, Piece


class Adam(Optimizer):
    """Options of AdamW, also where it updates what another kind leaves."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    def moments(self, weight: Weight) -> Mapping[str, Each]:
        return {"exp_avg": "element", "exp_avg_sq": "element"}

    def adamw(self, weights: Iterable[tuple[Tensor, Weight]], *, lr_scale: float = 1.0) -> list[torch.optim.Optimizer]:
        """Builds torch's fused AdamW, if there are weights; the training loop sets the learning rate at each step."""
        import torch

        groups = self.grouped(weights, lr_scale=lr_scale)
        betas = (self.beta1, self.beta2)
        return [torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)] if groups else []


class AdamW(Adam):
    """AdamW (Loshchilov and Hutter 2019)."""

    kind: Literal["adamw"] = "adamw"
    """AdamW."""

    def build(self, pieces: Sequence[Piece], mesh: Mesh) -> list[torch.optim.Optimizer]:
        return self.adamw(self.described(pieces))
