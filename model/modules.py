"""Modules that hold the weights of a part and compute what its config says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triplane.model.part import Part
from triplane.model.weights import Axis, Weight

if TYPE_CHECKING:
    from triplane.model.parts.norm import Mean, Norm
    from triplane.model.parts.positions import Positions


def unchanged(x: Tensor) -> Tensor:
    return x


class WeightsModule(nn.Module):
    """Parameters as `weights` describes them; a matrix NAME.weight becomes a linear layer NAME."""

    shared: Callable[[Tensor], Tensor]
    """Called with each weight that is not in `split`: where a rank sees only a part of its gradient, sums it."""
    split: set[str]
    """Weights of which this rank holds a share."""

    def __init__(self, weights: Iterable[Weight]):
        super().__init__()
        self.weights = {weight.name: weight for weight in weights}
        self.shared = unchanged
        self.split = set()
        for weight in self.weights.values():
            path, _, leaf = weight.name.rpartition(".")
            if not path:
                self.register_parameter(leaf, nn.Parameter(torch.empty(weight.shape)))
            elif leaf == "weight":
                out, into = weight.shape
                setattr(self, path, nn.Linear(into, out, bias=f"{path}.bias" in self.weights))

    def use(self, name: str) -> Tensor:
        """Returns a parameter of its own, for use in forward."""
        weight: Tensor = getattr(self, name)
        return weight if name in self.split else self.shared(weight)

    def drop_weights(self) -> None:
        """Removes its own parameters, on a rank that does not use them."""
        for name in list(self._parameters):
            delattr(self, name)


class PartModule(WeightsModule):
    """Attention or feed-forward; its linear layers and its attention core can be swapped."""

    if TYPE_CHECKING:  # a child, by the name in its config's `weights`

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, config: Part, weights: Iterable[Weight]):
        super().__init__(weights)
        self.config = config

    def forward(self, *args: Any) -> Tensor:
        return self.config.forward(self, *args)  # type: ignore[attr-defined]


class NormModule(WeightsModule):
    """A norm over the last of `axes`."""

    mean: Mean | None
    """Set where the last dim is split over ranks: the mean over all of them."""

    def __init__(self, config: Norm, axes: tuple[Axis, ...]):
        super().__init__(config.weights(*axes))
        self.config = config
        self.axes = axes
        self.mean = None

    def forward(self, x: Tensor) -> Tensor:
        return self.config.forward(self, x, self.mean)


class PositionsModule(WeightsModule):
    """Positions of all layers that have the same kind and options."""

    def __init__(self, config: Positions, weights: Iterable[Weight], *, n_heads: int, head_dim: int):
        super().__init__(weights)
        self.config = config
        self.n_heads = n_heads
        self.head_dim = head_dim
        self.heads = slice(0, n_heads)
        """The heads of this rank."""

    def forward(self, compute: Callable[..., Any], *args: Any) -> Any:
        """Calls a method of its config through the module, whose hooks may gather the weights."""
        return compute(self, *args)
