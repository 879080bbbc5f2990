"""Updates this rank's pieces of the parameters, in fp32, whichever way the parameters are spread over ranks.

Shards of any kind become pieces; clipping, the update, its state and checkpoints work on pieces alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Size, Tensor

from triplane.model.weights import Weight
from triplane.parallel.mesh import Axis, Mesh
from triplane.parallel.norm import squared_norm
from triplane.parallel.placement import Fragment, Placement, fragments

AVERAGE = "average"
"""The kind of fragments of the average of the weights."""

Each = Literal["element", "row"]
"""Of what a moment has a value: of each element of a weight, or of each row of a matrix."""


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

    @property
    def shape(self) -> Size:
        """Shape of the rows that it is of its parameter, which no run of elements has."""
        row = self.placement.local[1:]
        return Size((self.weight.numel() // row.numel(), *row))

    def zeros(self, each: Each) -> Tensor:
        """Returns a moment's first values."""
        return torch.zeros_like(self.weight) if each == "element" else self.weight.new_zeros(self.shape[:-1])

    def fragments(self, kind: str, values: Tensor, each: Each) -> Iterator[Fragment]:
        """Yields the boxes of the weight or of a moment."""
        placement, start = self.placement, self.start
        if each == "row":
            placement, start = placement.rows, start // placement.local[-1]
        return fragments(placement, kind, values.view(-1), start=start, primary=self.writes)


class OptimizerKind(Protocol):
    """How weights are updated: a table of the config."""

    @property
    def grad_clip(self) -> float: ...
    @property
    def average_decay(self) -> float | None:
        """Decay of the average of the weights; None: there is none."""
        ...

    def moments(self, weight: Weight) -> Mapping[str, Each]:
        """Returns what an update of `weight` keeps: names of tensors, and of what each has values."""
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
        self._steps = 0
        """Updates so far."""
        for piece in pieces:
            # Now rather than in the first step, so that a checkpoint can fill it.
            moments = {name: piece.zeros(each) for name, each in self._kept(piece).items()}
            step = torch.zeros((), device=piece.weight.device)  # the fused update requires it there
            self._states.append({"step": step, **moments})
            place[id(piece.weight)].state[piece.weight] = self._states[-1]

    def apply(self, learning_rate: float) -> Tensor:
        """Applies and clears the pieces' gradients; returns their global norm before clipping. Collective.

        Applies nothing if the norm is not finite.
        """
        norm = self._norm()
        here = norm.to(self.device)  # a fused update on the host would not wait for its own copy
        for optimizer in self.optimizers:
            set_rate(optimizer, learning_rate)
            # The update divides gradients by the one, so that clipping takes no pass of its own, and obeys the other.
            optimizer.grad_scale = ((here + 1e-6) / self.kind.grad_clip).clamp(min=1)  # type: ignore[attr-defined]
            optimizer.found_inf = (~here.isfinite()).float()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
        self._steps += 1
        self._follow(here.isfinite().float())
        return norm

    def discard(self) -> Tensor:
        """Clears the pieces' gradients; returns their global norm. Collective."""
        norm = self._norm()
        for piece in self.pieces:
            piece.weight.grad = None
        return norm

    def _kept(self, piece: Piece) -> dict[str, Each]:
        """Returns what is kept of a piece besides its weight, as `OptimizerKind.moments` does."""
        average: dict[str, Each] = {} if self.kind.average_decay is None else {AVERAGE: "element"}
        return {**self.kind.moments(piece.placement.weight), **average}

    def _follow(self, taken: Tensor) -> None:
        """Moves the average of the weights, by nothing if `taken` is 0; that of the first step is its weights."""
        if self.kind.average_decay is None:
            return
        decay = min(self.kind.average_decay, (self._steps - 1) / (self._steps + 8))
        for piece, state in zip(self.pieces, self._states):
            state[AVERAGE].lerp_(piece.weight.detach(), (1 - decay) * taken)

    def _norm(self) -> Tensor:
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
            yield from piece.fragments("weight", piece.weight.detach(), "element")
            for name, each in self._kept(piece).items():
                yield from piece.fragments(name, state[name], each)

    def loaded(self, step: int) -> None:
        """Adopts fragments that were filled with the state after `step` updates."""
        self._steps = step
        for state in self._states:
            state["step"].fill_(step)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of each parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]


def _weights(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])
