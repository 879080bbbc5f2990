"""Modules that hold the weights of a part and compute what its config says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triplane.model.dispatch import Dispatched, Slots, here
from triplane.model.grouped import grouped_product
from triplane.model.part import Part
from triplane.model.weights import Axis, Weight

if TYPE_CHECKING:
    from triplane.model.parts.norm import Mean, Norm
    from triplane.model.parts.positions import Positions


def unchanged(x: Tensor) -> Tensor:
    return x


class Multiplying:
    """A linear layer, whose product can be swapped."""

    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = staticmethod(F.linear)
    """Multiplies rows by the transpose of the weight, and adds the bias."""


class Linear(Multiplying, nn.Linear):
    """A linear layer of which this rank holds the whole."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias)


class WeightsModule(nn.Module):
    """Parameters as `weights` describes them; a matrix NAME.weight becomes a linear layer NAME, several matrices a
    `Stack`, and scores of experts a `Router`."""

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
                trained = weight.role != "state"
                self.register_parameter(leaf, nn.Parameter(torch.empty(weight.shape), requires_grad=trained))
            elif leaf == "weight":
                setattr(self, path, _layer([own for own in self.weights.values() if own.name.startswith(f"{path}.")]))

    def use(self, name: str) -> Tensor:
        """Returns a parameter of its own, for use in forward."""
        weight: Tensor = getattr(self, name)
        return weight if name in self.split else self.shared(weight)

    def drop_weights(self) -> None:
        """Removes its own parameters, on a rank that does not use them."""
        for name in list(self._parameters):
            delattr(self, name)


def _layer(weights: list[Weight]) -> nn.Module:
    """Returns a layer with this matrix, and a bias if there are two; a router may have more."""
    matrix, *bias = weights
    kind = {"expert": Stack, "choice": Router}.get(matrix.axes[0].name)
    if kind is not None:
        return kind(replace(weight, name=weight.name.rpartition(".")[2]) for weight in weights)
    out, into = matrix.shape
    return Linear(into, out, bias=bool(bias))


class Router(WeightsModule):
    """Scores of experts in fp32, which decide close calls as a small model's do."""

    def forward(self, x_TD: Tensor) -> Tensor:
        bias = self.use("bias").float() if "bias" in self.weights else None
        return F.linear(x_TD.float(), self.use("weight").float(), bias)


class Stack(WeightsModule):
    """A linear layer of each expert."""

    ranks: int
    """Ranks whose outputs are added up, because each holds a share of the input axis."""

    def __init__(self, weights: Iterable[Weight]):
        super().__init__(weights)
        self.ranks = 1

    def forward(self, x_SD: Tensor, slots: Slots) -> Tensor:
        out_SF = grouped_product(x_SD, self.use("weight"), slots.ends_E)
        if "bias" not in self.weights:
            return out_SF
        # A product, since the gradient of a look-up would be added up in no fixed order.
        return out_SF + slots.marked(x_SD.dtype) @ self.use("bias") / self.ranks


class PartModule(WeightsModule):
    """Attention or feed-forward; its linear layers and its attention core can be swapped."""

    copies: int
    """Ranks that compute the same of it, apart from products, and whose gradients are added up."""
    summed: Callable[[Tensor], Tensor]
    """Adds up outputs of which each rank has a share, (T, D); with sequence parallelism returns its tokens' rows."""
    dispatched: Callable[[Tensor, Slots], Dispatched]
    """Sends rows to the ranks of their experts."""
    summed_along: Callable[[Tensor], Tensor]
    """Adds up over the ranks that hold parts of the same sequences; without a gradient."""
    tally: Tensor | None
    """Its gradient counts what the part reports of the tokens that it trains on; None: nothing is counted."""

    if TYPE_CHECKING:  # a child, by the name in its config's `weights`

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, config: Part, weights: Iterable[Weight]):
        super().__init__(weights)
        self.config = config
        self.copies = 1
        self.summed = self.summed_along = unchanged
        self.dispatched = here
        self.tally = None

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
