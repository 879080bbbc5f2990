"""Which part of which global tensor this rank holds: what initial weights, norms and checkpoints build on."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Size, Tensor, nn

from triplane.parallel.mesh import Mesh


@dataclass(frozen=True)
class Placement:
    """A local parameter as a box of a named global tensor."""

    name: str
    parameter: nn.Parameter
    shape: Size
    """Of the global tensor."""
    offsets: tuple[int, ...]
    """Where the box starts in it."""
    primary: bool
    """False for a copy that another tp or pp rank holds too and answers for."""
    tied_copy: bool
    """True for the last stage's copy of the first stage's embedding."""

    @property
    def sharded(self) -> bool:
        return self.shape != self.parameter.shape


def place(module: nn.Module, shapes: dict[str, Size], tied: dict[str, str], mesh: Mesh) -> list[Placement]:
    """Places the parameters of this rank's `module`; `shapes` are those of the whole model.

    `tied` maps the name of a copy of another stage's parameter to that parameter's name.
    """
    placements = []
    for name, parameter in module.named_parameters():
        logical = tied.get(name, name)
        shape = shapes[logical]
        offsets = tuple(0 if local == whole else mesh.tp.rank * local for local, whole in zip(parameter.shape, shape))
        primary = name not in tied and (parameter.shape != shape or mesh.tp.rank == 0)
        placements.append(Placement(logical, parameter, shape, offsets, primary, tied_copy=name in tied))
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
    local = placement.parameter.shape
    if len(local) == 1:
        yield _fragment(placement, kind, (start,), flat, primary)
        return
    columns = local[1]
    position, stop = start, start + flat.numel()
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
