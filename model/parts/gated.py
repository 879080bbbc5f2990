"""Gated feed-forward (Shazeer 2020): SwiGLU, GEGLU, ReGLU, GLU, bilinear, by the activation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat, PositiveInt

from triplane.model.parts.activations import Activation, activation
from triplane.model.parts.feed_forward import FeedForward
from triplane.model.weights import Axis, Cost, Weight, linear

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.batch import Batch
    from triplane.model.modules import PartModule


class Gated(FeedForward):
    """w_down(activation(w_gate x) * (w_up x + up_offset))."""

    kind: Literal["gated"] = "gated"
    """Gated feed-forward."""
    hidden_dim: PositiveInt
    """Width inside."""
    activation: Activation = "silu"
    """Applied to the gate."""
    bias: bool = False
    """True: all three layers have a bias."""
    clamp: PositiveFloat | None = None
    """The gate's inputs are at most this, the others within plus and minus it; 7 in gpt-oss."""
    up_offset: float = 0.0
    """Added to the ungated half; 1 in gpt-oss."""

    def weights(self, dim: int) -> Iterator[Weight]:
        stream, hidden = Axis("dim", dim), Axis("hidden", self.hidden_dim)
        yield from linear("w_gate", hidden, stream, bias=self.bias)
        yield from linear("w_up", hidden, stream, bias=self.bias)
        yield from linear("w_down", stream, hidden, init="residual", bias=self.bias)

    def cost(self, dim: int) -> Cost:
        stream, hidden = Axis("dim", dim), self.hidden_dim
        return Cost(
            inputs=(stream, Axis("hidden", hidden)),
            kept=(Axis("hidden", 3 * hidden),),
            outputs=(stream, Axis("hidden", 2 * hidden)),
            moved=(Axis("hidden", 10 * hidden),),
        )

    def forward(self, m: PartModule, x_TD: Tensor, batch: Batch) -> Tensor:
        return m.w_down(self.gated(m.w_gate(x_TD), m.w_up(x_TD)))

    def gated(self, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        """Returns the input of the last layer, of the outputs of the others."""
        if self.clamp is not None:
            gate_TF, up_TF = gate_TF.clamp(max=self.clamp), up_TF.clamp(-self.clamp, self.clamp)
        if self.up_offset:
            up_TF = up_TF + self.up_offset
        return activation(self.activation)(gate_TF) * up_TF
