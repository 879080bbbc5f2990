"""The experts that all tokens pass, as one gated layer (DeepSeekMoE, Dai et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from triplane.model.parts.gated import Gated
from triplane.model.weights import Axis, Cost, Weight, linear

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.batch import Batch
    from triplane.model.modules import PartModule


class SharedExperts(Gated):
    """A gated layer; if `weighed`, times sigmoid(w x), a number for each token (Qwen2-MoE)."""

    kind: Literal["shared_experts"] = "shared_experts"  # type: ignore[assignment]
    """Within `experts`; no config names it."""
    weighed: bool = False
    """True: the output is weighed."""

    def weights(self, dim: int) -> Iterator[Weight]:
        yield from super().weights(dim)
        if self.weighed:
            yield from linear("weigh", Axis("gain", 1), Axis("dim", dim))

    def cost(self, dim: int) -> Cost:
        hidden = self.hidden_dim
        weighed = Cost(kept=(Axis("hidden", hidden),), moved=(Axis("hidden", 3 * hidden),))
        return super().cost(dim) + weighed if self.weighed else super().cost(dim)

    def forward(self, m: PartModule, x_TD: Tensor, batch: Batch) -> Tensor:
        if not self.weighed:
            return super().forward(m, x_TD, batch)
        hidden_TF = self.gated(m.w_gate(x_TD), m.w_up(x_TD))
        # Before the last layer, whose outputs are sums over tp: after it each rank would see the whole gradient of the
        # weight, and their sum would be too large.
        return m.w_down(hidden_TF * m.weigh(x_TD).sigmoid())
