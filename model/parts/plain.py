"""Plain feed-forward (Vaswani et al. 2017, section 3.3): two layers with an activation between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from triplane.model.parts.activations import Activation, activation
from triplane.model.parts.feed_forward import FeedForward
from triplane.model.weights import Axis, Cost, Weight, linear

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.batch import Batch
    from triplane.model.modules import PartModule


class Plain(FeedForward):
    """w_down(activation(w_up x))."""

    kind: Literal["plain"] = "plain"
    """Plain feed-forward."""
    hidden_dim: PositiveInt
    """Width inside; usually 4 `dim`."""
    activation: Activation = "gelu_tanh"
    """Applied between the layers."""
    bias: bool = True
    """True: both layers have a bias."""

    def weights(self, dim: int) -> Iterator[Weight]:
        stream, hidden = Axis("dim", dim), Axis("hidden", self.hidden_dim)
        yield from linear("w_up", hidden, stream, bias=self.bias)
        yield from linear("w_down", stream, hidden, init="residual", bias=self.bias)

    def cost(self, dim: int) -> Cost:
        stream, hidden = Axis("dim", dim), Axis("hidden", self.hidden_dim)
        return Cost(
            inputs=(stream, hidden),
            kept=(hidden,),
            outputs=(stream, hidden),
            moved=(Axis("hidden", 5 * self.hidden_dim),),
        )

    def forward(self, m: PartModule, x_TD: Tensor, batch: Batch) -> Tensor:
        return m.w_down(activation(self.activation)(m.w_up(x_TD)))
