"""What every kind of optimizer has: rate, decay, clipping, groups of weights. Imports torch only to build.

A kind is one file: a table of the config that says what it keeps of a weight, and builds what updates it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat

from triplane.model.weights import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from triplane.parallel.mesh import Mesh
    from triplane.parallel.update import Each, Piece


class WeightGroup(BaseModel):
    """Weights that learn at a rate or decay of their own; of several groups the last that a weight is in counts."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    weights: str
    """Names, with `*` for any characters, such as `blocks.*.attention.*`; or a role: `matrix`, `table`, `vector`."""
    lr_scale: NonNegativeFloat = 1.0
    """Their learning rate is this times the run's; 0 freezes them."""
    weight_decay: NonNegativeFloat | None = None
    """Their decay; none: as without the group."""

    def holds(self, weight: Weight) -> bool:
        return self.weights == weight.role or fnmatchcase(weight.name, self.weights)


class _Setting(NamedTuple):
    """How fast a weight learns and decays."""

    lr_scale: float
    weight_decay: float


class Optimizer(BaseModel):
    """Options of every kind."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices and tables, not to norms and biases."""
    grad_clip: PositiveFloat = 1.0
    """Maximum global gradient norm."""
    groups: list[WeightGroup] = []
    """Weights that learn differently."""
    average_decay: float | None = Field(default=None, ge=0, lt=1)
    """Decay a step of an exponential average of the weights, such as 0.999, which is kept beside them in fp32, and
    validated; step n uses at most (n - 1) / (n + 8), which soon forgets the first weights. None: no average."""

    def moments(self, weight: Weight) -> Mapping[str, Each]:
        """Returns what an update of `weight` keeps: names of tensors, and of what each has values."""
        raise NotImplementedError

    def kept(self, weight: Weight) -> float:
        """Returns the values kept for each element of `weight`: its moments, and the average of the weights."""
        moments = (1.0 if each == "element" else 1 / weight.axes[-1].size for each in self.moments(weight).values())
        return sum(moments) + (self.average_decay is not None)

    def update_flops(self, weight: Weight) -> int:
        """Returns the FLOPs of the products in an update of all of `weight`."""
        return 0

    def whole(self, weight: Weight) -> bool:
        """Returns whether one rank must update `weight` as a whole, rather than a share of its elements."""
        return False

    def build(self, pieces: Sequence[Piece], mesh: Mesh) -> list[torch.optim.Optimizer]:
        """Builds optimizers that together update `pieces`."""
        raise NotImplementedError

    def problems(self, weights: Iterable[Weight]) -> Iterator[str]:
        """Yields what does not fit a network of `weights`, as one line with its operands."""
        known = list(weights)
        for number, group in enumerate(self.groups):
            if not any(group.holds(weight) for weight in known):
                near = get_close_matches(group.weights, [weight.name for weight in known], n=1, cutoff=0)
                yield f"optimizer.groups.{number}: no weight is named {group.weights!r}; the nearest is {near[0]!r}"

    @staticmethod
    def described(pieces: Iterable[Piece]) -> Iterator[tuple[Tensor, Weight]]:
        """Yields the tensor of each piece and the weight that it is of."""
        return ((piece.weight, piece.placement.weight) for piece in pieces)

    def grouped(self, weights: Iterable[tuple[Tensor, Weight]], *, lr_scale: float = 1.0) -> list[dict[str, Any]]:
        """Returns torch's parameter groups: weights of one rate and one decay each."""
        found: dict[_Setting, list[Tensor]] = {}
        for tensor, weight in weights:
            setting = _Setting(lr_scale, 0.0 if weight.role == "vector" else self.weight_decay)
            for group in self.groups:
                if group.holds(weight):
                    decay = setting.weight_decay if group.weight_decay is None else group.weight_decay
                    setting = _Setting(lr_scale * group.lr_scale, decay)
            found.setdefault(setting, []).append(tensor)
        return [{"params": tensors, **setting._asdict()} for setting, tensors in found.items()]
