"""Muon (Jordan et al. 2024): matrices of blocks step by the orthogonal factor of their momentum, the rest by AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from triplane.model.weights import Axis, Weight
from triplane.training.optimizers.adamw import Adam

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from triplane.parallel.mesh import Mesh
    from triplane.parallel.update import Each, Piece


class Muon(Adam):
    """Muon (Jordan et al. 2024) for the matrices of blocks; AdamW, whose options it has too, for all else."""

    kind: Literal["muon"]
    """Muon."""
    adamw_lr: PositiveFloat | None = None
    """Peak rate of what AdamW updates; none: `lr`, which fits with `scaling = "match_rms_adamw"`."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the moment."""
    nesterov: bool = True
    """Look a step ahead: mix the gradient into the moment once more."""
    scaling: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """`match_rms_adamw`: 0.2 sqrt(larger side), so that AdamW's rates and decays fit (Liu et al. 2025). `original`:
    sqrt(outputs / inputs), at least 1, for rates near 0.02."""
    coefficients: Literal["polar_express", "classic"] = "polar_express"
    """Of the Newton-Schulz iteration: `polar_express`, others for each iteration (Amsel et al. 2025), or the same."""
    iterations: PositiveInt = 5
    """Of Newton-Schulz."""
    second_moment_decay: float | None = Field(default=None, ge=0, lt=1)
    """Of the mean square of each row's steps, by whose root its step is divided; then the matrix's is brought back to
    its length: NorMuon (Li et al. 2025), there 0.95. None: as the orthogonal factor is."""
    by_head: bool = False
    """Orthogonalise the queries, keys and values of each head apart."""
    iterate_in: Literal["bf16", "fp32"] = "bf16"
    """Precision of the iteration; its error is far larger than the rounding of bf16."""

    def whole(self, weight: Weight) -> bool:
        """Returns whether `weight` is a matrix of a block."""
        return weight.role == "matrix"

    def moments(self, weight: Weight) -> Mapping[str, Each]:
        if not self.whole(weight):
            return super().moments(weight)
        kept: dict[str, Each] = {"momentum": "element"}
        return kept if self.second_moment_decay is None else {**kept, "second_moment": "row"}

    def update_flops(self, weight: Weight) -> int:
        """Returns those of Newton-Schulz: X X', its square, and their polynomial times X, where X is wide."""
        if not self.whole(weight):
            return 0
        *stack, outputs, inputs = weight.axes
        heads = outputs.count if self._splits(outputs) else 1
        small, large = sorted((outputs.size // heads, inputs.size))
        count = prod(axis.size for axis in stack) * heads
        return self.iterations * count * (4 * small**2 * large + 2 * small**3)

    def build(self, pieces: Sequence[Piece], mesh: Mesh) -> list[torch.optim.Optimizer]:
        from triplane.parallel.whole import WholeMatrices
        from triplane.training.optimizers.own_update import MuonUpdate

        matrices = [piece for piece in pieces if self.whole(piece.placement.weight)]
        rest = [piece for piece in pieces if not self.whole(piece.placement.weight)]
        others = self.adamw(self.described(rest), lr_scale=(self.adamw_lr or self.lr) / self.lr)
        if not matrices:  # they are on other ranks
            return others
        muon = MuonUpdate(
            self.grouped(self.described(matrices)),
            WholeMatrices(matrices, mesh),
            self.orthogonal,
            momentum=self.momentum,
            nesterov=self.nesterov,
            second_moment_decay=self.second_moment_decay,
        )
        return [muon, *others]

    def orthogonal(self, weight: Weight, whole: Tensor) -> Tensor:
        """Returns the scaled orthogonal factor of a whole matrix, of each expert's, or of each head's."""
        import torch

        from triplane.training.optimizers.newton_schulz import orthogonal

        shape, outputs = whole.shape, weight.axes[0]
        if self._splits(outputs):
            whole = whole.view(outputs.count, outputs.width, -1)
        rows, columns = whole.shape[-2:]
        scale = 0.2 * sqrt(max(rows, columns))
        if self.scaling == "original":
            scale = sqrt(max(1, rows / columns))
        whole = whole.to(torch.bfloat16 if self.iterate_in == "bf16" else torch.float32)
        return (scale * orthogonal(whole, self.coefficients, self.iterations).float()).view(shape)

    def _splits(self, outputs: Axis) -> bool:
        """Returns whether the heads of these outputs are matrices of their own."""
        return self.by_head and outputs.name in ("head", "kv_head")

    def problems(self, weights: Iterable[Weight]) -> Iterator[str]:
        known = list(weights)
        yield from super().problems(known)
        if not any(map(self.whole, known)):
            yield 'optimizer.kind "muon" updates the matrices of blocks, and this network has none; use "adamw"'
