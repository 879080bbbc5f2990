"""Updates this rank's pieces of the parameters, in fp32, whichever way the parameters are spread over ranks.

Shards of any kind become pieces; clipping, the update, its state and checkpoints work on pieces alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from triplane.model.weights import Weight
from triplane.parallel.mesh import Axis, Mesh
from triplane.parallel.norm import squared_norm
from triplane.parallel.placement import Fragment, Placement, fragments


@dataclass(frozen=True)
class Piece:
    """A run of the elements of a flattened local parameter, which this rank updates."""

    placement: Placement
    weight: Tensor
    """fp32, the live master; a step reads its `grad`. Has the parameter's shape if it is all of it, else one dim."""
    start: int = 0
    """Its first element in the flattened parameter."""
    copies: int = 1
    """Ranks that hold the same elements and update them alike."""
    writes: bool = True
    """True on the one of them that writes checkpoints."""
    cut: Axis | None = None
    """The ranks among which the rows of the parameter are spread, equally many but for the last; None: it is whole, or
    a run of elements."""


class OptimizerKind(Protocol):
    """How weights are updated: a table of the config."""

    @property
    def grad_clip(self) -> float: ...
    def moments(self, weight: Weight) -> tuple[str, ...]:
        """Returns the names of the tensors that an update of `weight` keeps, each of its size."""
        ...

    def whole(self, weight: Weight) -> bool:
        """Returns whether one dp x cp rank must update all that its tp rank holds of `weight`."""
        ...

    def build(self, pieces: Sequence[Piece], mesh: Mesh) -> list[torch.optim.Optimizer]:
        """Builds optimizers that together update `pieces`.

        Each divides gradients by its `grad_scale` and does nothing if its `found_inf` is 1, as torch's fused ones do.
        A parameter group's rate is the run's times the group's `lr_scale`.
        """
        ...


class Update:
    """Clips gradients by the global norm and updates the pieces."""

    def __init__(self, kind: OptimizerKind, pieces: Sequence[Piece], mesh: Mesh):
        self.kind = kind
        self.pieces = pieces
        self.mesh = mesh
        self.device = next((piece.weight.device for piece in pieces), mesh.device)
        """Where it updates: the device, or the host."""
        self.optimizers = kind.build(pieces, mesh)
        place = {id(weight): optimizer for optimizer in self.optimizers for weight in _weights(optimizer)}
        self._states: list[dict[str, Tensor]] = []
        for piece in pieces:
            # Now rather than in the first step, so that a checkpoint can fill it.
            moments = {name: torch.zeros_like(piece.weight) for name in kind.moments(piece.placement.weight)}
            step = torch.zeros((), device=piece.weight.device)  # the fused update requires it there
            self._states.append({"step": step, **moments})
            place[id(piece.weight)].state[piece.weight] = self._states[-1]

    def apply(self, learning_rate: float) -> Tensor:
        """Applies and clears the pieces' gradients; returns their global norm before clipping. Collective.

        Applies nothing if the norm is not finite.
        """
        norm = self._gradient_norm()
        here = norm.to(self.device)  # a fused update on the host would not wait for its own copy
        for optimizer in self.optimizers:
            set_rate(optimizer, learning_rate)
            # The update divides gradients by the one, so that clipping takes no pass of its own, and obeys the other.
            optimizer.grad_scale = ((here + 1e-6) / self.kind.grad_clip).clamp(min=1)  # type: ignore[attr-defined]
            optimizer.found_inf = (~here.isfinite()).float()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        return norm

    def _gradient_norm(self) -> Tensor:
        """Returns the norm over the whole model: sums over all ranks, and counts copies once."""
        squared = torch.zeros((), dtype=torch.float64, device=self.device)
        for copies in {piece.copies for piece in self.pieces}:
            alike = [piece for piece in self.pieces if piece.copies == copies and piece.placement.primary]
            gradients = [piece.weight.grad for piece in alike]
            assert all(gradient is not None for gradient in gradients), "every parameter takes part in every step"
            squared += squared_norm((gradient for gradient in gradients if gradient is not None), self.device) / copies
        squared = squared.to(self.mesh.device)
        dist.all_reduce(squared)
        return squared.sqrt().float()

    def fragments(self) -> Iterator[Fragment]:
        """Yields the state on this rank."""
        for piece, state in zip(self.pieces, self._states):
            moments = {name: tensor for name, tensor in state.items() if name != "step"}
            for name, tensor in {"weight": piece.weight.detach(), **moments}.items():
                yield from fragments(piece.placement, name, tensor.view(-1), start=piece.start, primary=piece.writes)

    def loaded(self, step: int) -> None:
        """Adopts fragments that were filled with the state after `step` updates."""
        for state in self._states:
            state["step"].fill_(step)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of each parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def _weights(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])
