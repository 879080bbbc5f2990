"""The description that a part gives of itself: its weights, and the cost of a token in it. Imports no torch.

Initial values, counts, FLOPs, optimizer groups, tensor parallelism, placements and the plan fold over these.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Literal

_IN_WIDER_BITS = {"expert", "choice", "gain"}
"""Outermost axes of matrices that `fp8` leaves in the weights' own precision."""
Init = Literal["normal", "residual"] | float
"""`normal` draws with `init_std`; `residual` with `init_std / sqrt(2 n_layers)`; a number fills."""


@dataclass(frozen=True)
class Axis:
    """One dim of a weight: `count` pieces of `width` elements each; only whole pieces are split over ranks."""

    name: str
    """`vocab`, `head`, `kv_head` and `hidden` may be split over tp ranks; `parallel/axes.py` lists all."""
    count: int
    width: int = 1

    @property
    def size(self) -> int:
        return self.count * self.width


@dataclass(frozen=True)
class Weight:
    """A named tensor; a matrix has its output axis before its input axis, as in torch's linear layers, and before both
    that of experts, if there are several matrices."""

    name: str
    axes: tuple[Axis, ...]
    init: Init
    role: Literal["matrix", "table", "vector", "state"]
    """`matrix`: multiplies, and decays. `table`: is looked up, and decays. `vector`: gains and biases; no decay.
    `state`: has no gradient; its part changes it after each step."""
    share: float = 1.0
    """Share of the tokens that each element multiplies, less than 1 for experts."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def in_fp8(self) -> bool:
        """Whether `fp8` multiplies it in 8 bits: the matrix of a linear layer that all tokens pass.

        Not those of experts, whose products are grouped, nor of a router or a gate, whose scores decide close calls.
        """
        return self.role == "matrix" and self.axes[0].name not in _IN_WIDER_BITS


def under(prefix: str, weights: Iterable[Weight]) -> Iterator[Weight]:
    """Yields `weights` with `prefix.` before each name."""
    return (replace(weight, name=f"{prefix}.{weight.name}") for weight in weights)


def linear(name: str, out: Axis, into: Axis, *, init: Init = "normal", bias: bool = False) -> Iterator[Weight]:
    """Yields the matrix of a linear layer, and its bias if it has one."""
    yield Weight(f"{name}.weight", (out, into), init, "matrix")
    if bias:
        yield Weight(f"{name}.bias", (out,), 0.0, "vector")


def stacked(experts: Axis, active: int, weights: Iterable[Weight]) -> Iterator[Weight]:
    """Yields `weights` for each of `experts`, of which a token passes `active`."""
    return (replace(w, axes=(experts, *w.axes), share=active / experts.count) for w in weights)


Elements = tuple[Axis, ...]
"""Elements by the axes along which ranks may share them; `dim` is the residual stream's."""


def times(number: int, elements: Elements) -> Elements:
    """Returns `number` times as many."""
    return tuple(replace(axis, width=number * axis.width) for axis in elements)


@dataclass(frozen=True)
class Cost:
    """The cost of one token in a part, besides its matrices."""

    inputs: Elements = ()
    """Inputs of its matrices, kept for backward."""
    wide: Elements = ()
    """Those of `inputs` that `fp8` leaves in the weights' own precision."""
    kept: Elements = ()
    """Further activations, kept for backward unless they are recomputed."""
    outputs: Elements = ()
    """Outputs of matrices that selective recomputation keeps, besides `attended`."""
    attended: Elements = ()
    """Queries, keys, values and the output of attention; kept unless the whole block is recomputed."""
    statistics: Elements = ()
    """fp32 values that attention keeps."""
    scores: Elements = ()
    """Multiply-adds of queries with the keys that a token sees; those with values are as many."""
    dispatched: Elements = ()
    """Elements that ranks with other experts receive, and as many that they return."""
    moved: Elements = ()
    """Elements read and written in forward by what is no matrix product and no copy of what is dispatched."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))
