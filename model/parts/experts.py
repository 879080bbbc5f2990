"""Sparse experts (Shazeer et al. 2017): each token passes a few of many gated layers, those that a router chooses.

No expert has a limit, so no token is dropped. The selection jumps where two scores are equal; elsewhere all is smooth.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from triplane.model.parts.balance import STATE, SelectionBias, SequenceLoss
from triplane.model.parts.gated import Gated
from triplane.model.parts.shared import SharedExperts
from triplane.model.weights import Axis, Cost, Weight, linear, stacked, times, under

if TYPE_CHECKING:
    from torch import Tensor

    from triplane.model.batch import Batch
    from triplane.model.modules import PartModule


class Experts(Gated):
    """Sum over the chosen experts of their weight times a gated layer, plus a gated layer that all tokens pass."""

    kind: Literal["experts"] = "experts"  # type: ignore[assignment]
    """Sparse experts; the options of `gated` hold for each."""
    n_experts: PositiveInt
    """Experts that the router chooses from, of width `hidden_dim` each."""
    active: PositiveInt
    """Experts that a token passes."""
    shared: NonNegativeInt = 0
    """Experts that all tokens pass besides (DeepSeekMoE), as one layer of width `shared x hidden_dim`."""
    shared_gate: bool = False
    """True: what the shared experts add is multiplied by sigmoid(w x), a number for each token (Qwen2-MoE)."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores: `softmax` (Mixtral), `sigmoid` (DeepSeek-V3)."""
    router_bias: bool = False
    """True: the router's logits have a bias, as in gpt-oss."""
    normalise: bool = True
    """True: the weights of a token's experts add up to 1. False: they are their scores."""
    routed_scale: PositiveFloat = 1.0
    """Multiplies the weights; 2.5 in DeepSeek-V3."""
    groups: PositiveInt = 1
    """Groups of `n_experts / groups` experts each; a token chooses groups first."""
    active_groups: PositiveInt = 1
    """Groups in which a token's experts are; 4 of 8 in DeepSeek-V3."""
    group_best: PositiveInt = 2
    """A group's rank is the sum of its so many best scores: 2 in DeepSeek-V3, 1 in DeepSeek-V2."""
    balance: Annotated[SequenceLoss | SelectionBias, Field(discriminator="kind")] | None = None
    """What keeps the experts equally busy. None: nothing."""
    z_loss_weight: NonNegativeFloat = 0.0
    """Weight of the mean squared log-partition of the router's logits in the loss (ST-MoE); 1e-3 there."""

    @property
    def biased(self) -> bool:
        """True if a bias counts in the selection."""
        return isinstance(self.balance, SelectionBias)

    @property
    def imbalance_weight(self) -> float:
        """Weight of the loss of uneven loads."""
        return self.balance.weight if isinstance(self.balance, SequenceLoss) else 0.0

    @property
    def tallied(self) -> int:
        return 2 + self.n_experts  # added losses, entropy of the scores, tokens of each expert

    def reported(self, tally: list[float]) -> dict[str, float]:
        _, entropy, *loads = tally
        dropped = round(1 - sum(loads) / self.active, 9)
        return {
            "expert_load": max(loads) * self.n_experts / self.active,
            "router_entropy": entropy,
            "dropped_tokens": dropped,
        }

    def after_step(self, m: PartModule, counts: Tensor, applied: Tensor) -> None:
        if isinstance(self.balance, SelectionBias):
            loads_E = counts[2:]
            above_E = (loads_E * self.n_experts - loads_E.sum()).sign()  # whole numbers, so that equal loads are equal
            m.router.selection_bias.sub_(self.balance.rate * applied * above_E)

    def problems(self) -> Iterator[str]:
        if self.shared_gate and (self.bias or not self.shared):
            yield f"shared_gate requires shared experts without bias, but shared is {self.shared}, bias {self.bias}"
        each, rest = divmod(self.n_experts, self.groups)
        if rest:
            yield (
                f"n_experts ({self.n_experts}) is not a multiple of groups ({self.groups}); the next multiple is "
                f"{self.n_experts + self.groups - rest}"
            )
        elif self.groups > 1 and each < self.group_best:
            yield f"group_best ({self.group_best}) is over n_experts ({self.n_experts}) / groups ({self.groups})"
        elif self.active_groups > self.groups:
            yield f"active_groups ({self.active_groups}) is over groups ({self.groups})"
        elif self.active > self.active_groups * each:
            within = f" / groups ({self.groups}) x active_groups ({self.active_groups})" if self.groups > 1 else ""
            yield f"active ({self.active}) is over n_experts ({self.n_experts}){within}"

    def weights(self, dim: int) -> Iterator[Weight]:
        yield from linear("router", self._choices, Axis("dim", dim), bias=self.router_bias)
        if self.biased:
            yield Weight(STATE, (self._choices,), 0.0, "state")
        yield from stacked(Axis("expert", self.n_experts), self.active, super().weights(dim))
        if self.shared:
            yield from under("always", self._always.weights(dim))

    def cost(self, dim: int) -> Cost:
        """The rows of tokens are copied for each of their experts, and so are those of the output."""
        own = super().cost(dim)
        rows = Axis("dim", self.active * dim)
        inputs = (Axis("dim", dim), *times(self.active, own.inputs))
        routed = Cost(
            inputs=inputs,
            wide=inputs,
            kept=(rows, *times(self.active, own.kept), Axis("choice", 2 * self.n_experts)),
            outputs=times(self.active, own.outputs),
            dispatched=(rows,),
            moved=(Axis("dim", 3 * self.active * dim), *times(self.active, own.moved)),
        )
        return routed + self._always.cost(dim) if self.shared else routed

    def forward(self, m: PartModule, x_TD: Tensor, batch: Batch) -> Tensor:
        from triplane.model import router
        from triplane.model.dispatch import Slots

        experts_TA, weights_TA = router.route(self, m, x_TD, batch)
        slots = Slots.of(experts_TA, self.n_experts)
        arrived, own, back = m.dispatched(slots.spread(x_TD), slots)
        always_TD = m.always(x_TD, batch) if self.shared else None  # while the rows travel
        rows_SD = arrived()
        hidden_SF = self.gated(m.w_gate(rows_SD, own), m.w_up(rows_SD, own))
        out_TD = m.summed(slots.combined(back(m.w_down(hidden_SF, own)), weights_TA))
        return out_TD if always_TD is None else out_TD + always_TD

    def build(self, dim: int) -> PartModule:
        from triplane.model.modules import PartModule

        always = [weight for weight in self.weights(dim) if weight.name.startswith("always.")]
        module = PartModule(self, [weight for weight in self.weights(dim) if weight not in always])
        if self.shared:
            module.always = self._always.build(dim)
        return module

    @property
    def _choices(self) -> Axis:
        return Axis("choice", self.n_experts)

    @property
    def _always(self) -> SharedExperts:
        fields = {name: getattr(self, name) for name in Gated.model_fields if name != "kind"}
        return SharedExperts(**fields | {"hidden_dim": self.shared * self.hidden_dim, "weighed": self.shared_gate})
