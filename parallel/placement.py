"""Maps this rank's parameters to boxes of global tensors; initial weights, norms and checkpoints build on it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Size, Tensor, nn

from triplane.model.describe import model_weights
from triplane.model.transformer import Transformer
from triplane.model.weights import Weight
from triplane.parallel.axes import split_dim, spreads_experts
from triplane.parallel.mesh import Mesh, Spread


@dataclass(frozen=True)
class Placement:
    """A local parameter as a box of a named global tensor."""

    weight: Weight
    """The global tensor, as the network describes it."""
    parameter: nn.Parameter
    local: Size
    """Shape on this tp and pp rank, before ZeRO 3 shards it; may reach past the global tensor."""
    offsets: tuple[int, ...]
    """Where the box starts in the global tensor."""
    sharded: bool
    """True if the tp ranks hold different parts."""
    primary: bool
    """False for a copy for which another tp or pp rank is responsible."""
    tied_copy: bool
    """True for a later stage's copy of a weight of the first one."""
    spread: Spread
    """The ranks that hold the same part."""

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def role(self) -> str:
        return self.weight.role

    @property
    def shape(self) -> Size:
        """Shape of the global tensor."""
        return Size(self.weight.shape)

    @property
    def rows(self) -> "Placement":
        """Places one value for each row of the matrix, which the tp ranks that split its columns hold alike."""
        return replace(
            self,
            weight=replace(self.weight, axes=self.weight.axes[:-1]),
            local=self.local[:-1],
            offsets=self.offsets[:-1],
            sharded=self.sharded and self.local[-1] == self.shape[-1],
            primary=self.primary and self.offsets[-1] == 0,
        )

    @property
    def elements(self) -> int:
        """Elements of the flattened parameter that lie in the global tensor; a vocabulary's padding rows do not."""
        rows = min(self.local[0], max(0, self.shape[0] - self.offsets[0]))
        return rows * self.local[1:].numel()

    def cuts(self, ranks: int) -> list[int]:
        """Returns where each rank's rows begin in the flattened parameter, and the end.

        All ranks have equally many rows but for the last ones, as FSDP2 cuts them.
        """
        each = -(-self.local[0] // ranks)
        return [min(self.local[0], number * each) * self.local[1:].numel() for number in range(ranks + 1)]


def place(model: Transformer, mesh: Mesh, *, local: dict[str, Size], tied: dict[str, str]) -> list[Placement]:
    """Places the parameters of this rank's `model`.

    `local` are their shapes before ZeRO 3. `tied` maps the name of a copied parameter to its name on the stage that
    owns it.
    """
    weights = model_weights(model.config)
    placements = []
    for name, parameter in model.named_parameters():
        logical = tied.get(name, name)
        dim = split_dim(weights[logical], mesh.tp.size)
        ranks = {} if dim is None else {dim: mesh.tp.rank}
        if spreads_experts(weights[logical], mesh.ep.size):
            ranks[0] = mesh.ep.rank
        offsets = tuple(ranks.get(i, 0) * size for i, size in enumerate(local[name]))
        placements.append(
            Placement(
                weight=weights[logical],
                parameter=parameter,
                local=local[name],
                offsets=offsets,
                sharded=dim is not None,
                primary=name not in tied and (dim is not None or mesh.tp.rank == 0),
                tied_copy=name in tied,
                spread=spread_of(weights[logical], mesh),
            )
        )
    return placements


def spread_of(weight: Weight, mesh: Mesh) -> Spread:
    """Returns the ranks that hold the same part of `weight`."""
    if not spreads_experts(weight, mesh.ep.size):
        return mesh.spread
    assert mesh.expert_spread is not None
    return mesh.expert_spread


@dataclass(frozen=True)
class Fragment:
    """A box of a named global tensor, and the memory that holds it on this rank."""

    kind: str
    """`weight` (fp32 master), or what the optimizer calls it, such as `exp_avg`."""
    name: str
    shape: Size
    offsets: tuple[int, ...]
    data: Tensor
    """A view of the live state, with the box's shape: a load fills it, a save reads it."""
    primary: bool
    """True on the one rank that writes this box."""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


def fragments(placement: Placement, kind: str, flat: Tensor, *, start: int, primary: bool) -> Iterator[Fragment]:
    """Yields the boxes that `flat`, the elements from `start` of the flattened local parameter, fills.

    A run of a matrix's elements makes up to three boxes: the end of a row, whole rows, the start of a row; of a tensor
    with n dims up to 2n - 1.
    """
    strides = [placement.local[dim + 1 :].numel() for dim in range(len(placement.local))]
    stop = min(start + flat.numel(), placement.elements)
    position = start
    while position < stop:
        # The outermost dim of which a slice starts here and ends in the run.
        dim = next(d for d, stride in enumerate(strides) if position % stride == 0 and position + stride <= stop)
        place = tuple(position // stride % size for stride, size in zip(strides, placement.local))
        slices = min((stop - position) // strides[dim], placement.local[dim] - place[dim])
        sizes = (*[1] * dim, slices, *placement.local[dim + 1 :])
        length = slices * strides[dim]
        data = flat[position - start : position - start + length].view(sizes)
        yield _fragment(placement, kind, data, local=place, primary=primary)
        position += length


def _fragment(placement: Placement, kind: str, data: Tensor, *, local: tuple[int, ...], primary: bool) -> Fragment:
    return Fragment(
        kind=kind,
        name=placement.name,
        shape=placement.shape,
        offsets=tuple(a + b for a, b in zip(placement.offsets, local)),
        data=data,
        primary=primary and placement.primary,
    )


@dataclass(frozen=True)
class LocalModel:
    """This rank's part of the model, initially zeros."""

    stages: list[Transformer]
    """One, or the virtual stages, in the order in which a token passes them."""
    placements: list[Placement]
    dtype: torch.dtype
    states: dict[str, Tensor]
    """Whole tensors in fp32, the same on all ranks that have them, which parts change after each step."""

    @property
    def module(self) -> nn.Module:
        """All stages as one module."""
        return self.stages[0] if len(self.stages) == 1 else nn.ModuleList(self.stages)
