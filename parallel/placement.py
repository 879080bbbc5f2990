"""Which part of which global tensor this rank holds: what initial weights, norms and checkpoints build on."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Mesh


@dataclass(frozen=True)
class Placement:
    """A local parameter as a box of a named global tensor."""

    name: str
    parameter: nn.Parameter
    shape: Size
    """Of the global tensor."""
    local: Size
    """Of the parameter on this tp and pp rank, before ZeRO 3 takes it apart; may reach past the global tensor."""
    offsets: tuple[int, ...]
    """Where the box starts in the global tensor."""
    sharded: bool
    """True if tp ranks hold different parts."""
    primary: bool
    """False for a copy that another tp or pp rank holds too and answers for."""
    tied_copy: bool
    """True for the last stage's copy of the first stage's embedding."""

    @property
    def elements(self) -> int:
        """Of the flattened parameter those that are in the global tensor; padding rows of a vocabulary are not."""
        rows = min(self.local[0], max(0, self.shape[0] - self.offsets[0]))
        return rows * self.local[1:].numel()


def place(
    module: nn.Module, shapes: dict[str, Size], local: dict[str, Size], tied: dict[str, str], mesh: Mesh
) -> list[Placement]:
    """Places the parameters of this rank's `module`.

    `shapes` are those of the whole model, `local` those of this module before ZeRO 3. `tied` maps the name of a
    copy of another stage's parameter to that parameter's name. A module with an attribute `tp_dim` holds a share
    of its weight along that dim.
    """
    placements = []
    for name, parameter in module.named_parameters():
        logical = tied.get(name, name)
        dim = getattr(module.get_submodule(name.rpartition(".")[0]), "tp_dim", None)
        offsets = tuple(mesh.tp.rank * size if i == dim else 0 for i, size in enumerate(local[name]))
        placements.append(
            Placement(
                logical,
                parameter,
                shapes[logical],
                local[name],
                offsets,
                sharded=dim is not None,
                primary=name not in tied and (dim is not None or mesh.tp.rank == 0),
                tied_copy=name in tied,
            )
        )
    return placements


@dataclass(frozen=True)
class Fragment:
    """A box of a named global tensor, and the memory that holds it on this rank."""

    kind: str
    """`weight` (fp32 master), `exp_avg` or `exp_avg_sq`."""
    name: str
    shape: Size
    offsets: tuple[int, ...]
    data: Tensor
    """A view of the live state, as large as the box: reading fills it, writing reads it."""
    primary: bool
    """True on the one rank that writes this box."""

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


def fragments(placement: Placement, kind: str, flat: Tensor, start: int, primary: bool) -> Iterator[Fragment]:
    """The boxes that `flat`, the elements from `start` of the flattened local parameter, fills.

    A run of a matrix's elements is up to three boxes: the end of a row, whole rows, the start of a row.
    """
    stop = min(start + flat.numel(), placement.elements)
    if len(placement.local) == 1:
        if start < stop:
            yield _fragment(placement, kind, (start,), flat[: stop - start], primary)
        return
    columns = placement.local[1]
    position = start
    while position < stop:
        row, column = divmod(position, columns)
        if column or stop - position < columns:
            length = min(columns - column, stop - position)
            sizes = (1, length)
        else:
            length = (stop - position) // columns * columns
            sizes = (length // columns, columns)
        data = flat[position - start : position - start + length].view(sizes)
        yield _fragment(placement, kind, (row, column), data, primary)
        position += length


def _fragment(placement: Placement, kind: str, local: tuple[int, ...], data: Tensor, primary: bool) -> Fragment:
    offsets = tuple(a + b for a, b in zip(placement.offsets, local))
    return Fragment(kind, placement.name, placement.shape, offsets, data, primary and placement.primary)


@dataclass(frozen=True)
class LocalModel:
    """What this rank holds of the model, all zeros."""

    stages: list[Transformer]
    """One, or as many as there are virtual stages, in the order in which a token passes them."""
    placements: list[Placement]
    dtype: torch.dtype

    @property
    def module(self) -> nn.Module:
        """All of it as one module."""
        return self.stages[0] if len(self.stages) == 1 else nn.ModuleList(self.stages)
