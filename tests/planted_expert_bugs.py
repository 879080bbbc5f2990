"""Bugs of experts, with a layout in which each shows; `planted_bugs` has all others."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from triplane.model import router
from triplane.model.batch import Batch
from triplane.model.modules import Stack
from triplane.model.parts.gated import Gated
from triplane.model.parts.shared import SharedExperts
from triplane.parallel import bucket, context, experts, groups, tensor
from triplane.parallel.engine import Engine
from triplane.parallel.fully_sharded import FullyShardedOptimizer
from triplane.parallel.mesh import Axis

ONE_SHARED, IN_GROUPS, WITH_BIASES = "experts, one shared", "experts in groups", "experts with biases"
AFTER_DENSE = "experts after a dense layer"
MICRO_BATCHES = 4


def _with_added_losses_of_each_micro_batch(patch: pytest.MonkeyPatch) -> None:
    right: Any = Batch.__init__

    def init(self: Any, *args: Any, scale: float | None = None, **fields: Any) -> None:
        right(self, *args, scale=None if scale is None else scale * MICRO_BATCHES, **fields)

    patch.setattr(Batch, "__init__", init)


def _with_added_losses_of_each_tp_rank(patch: pytest.MonkeyPatch) -> None:
    right = tensor._split_layers

    def split(part: Any, *args: Any) -> None:
        right(part, *args)
        part.copies = 1

    patch.setattr(tensor, "_split_layers", split)


def _with_loads_of_own_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(context, "_summed", lambda x, cp: x)


def _with_doubled_gradients_of_experts(patch: pytest.MonkeyPatch) -> None:
    right = bucket.Bucket.finish

    def finish(self: Any, replicas: int) -> None:
        right(self, self.spread.shards.size * self.spread.copies.size)  # the mean over the ranks with these experts

    patch.setattr(bucket.Bucket, "finish", finish)


def _with_rows_in_the_order_of_ranks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(experts, "permuted", lambda rows, order, inverse: rows)


def _with_a_bias_from_own_loads(patch: pytest.MonkeyPatch) -> None:
    right = Engine._take_tallies

    def taken(self: Any) -> torch.Tensor:
        self.own = right(self)
        return self.own.clone()

    stepped = Engine.step

    def step(self: Any, rate: float) -> torch.Tensor:
        self._counts = self.own
        return stepped(self, rate)

    patch.setattr(Engine, "_take_tallies", taken)
    patch.setattr(Engine, "step", step)


def _with_a_bias_of_the_last_micro_batch(patch: pytest.MonkeyPatch) -> None:
    right: Any = router._Counted.backward

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weights, losses, tally, *rest = right(ctx, grad)
        ctx.total.grad = None
        return weights, losses, tally, *rest

    saved: Any = router._Counted.forward

    def forward(ctx: Any, weights: Any, losses: Any, total: Any, tally: Any, scale: float) -> torch.Tensor:
        ctx.total = total
        out: torch.Tensor = saved(ctx, weights, losses, total, tally, scale)
        return out

    patch.setattr(router._Counted, "forward", forward)
    patch.setattr(router._Counted, "backward", backward)


def _with_counts_in_every_forward(patch: pytest.MonkeyPatch) -> None:
    right: Any = router._Counted.forward

    def forward(ctx: Any, weights: Any, losses: Any, total: Any, tally: Any, scale: float) -> torch.Tensor:
        total.grad = tally.clone() if total.grad is None else total.grad + tally
        out: torch.Tensor = right(ctx, weights, losses, total, torch.zeros_like(tally), scale)
        return out

    patch.setattr(router._Counted, "forward", forward)


def _with_the_experts_bias_on_each_rank(patch: pytest.MonkeyPatch) -> None:
    right = tensor._split_layers

    def split(part: Any, *args: Any) -> None:
        right(part, *args)
        for child in part.children():
            if isinstance(child, Stack):
                child.ranks = 1

    patch.setattr(tensor, "_split_layers", split)


def _with_gradients_over_the_holders_of_experts(patch: pytest.MonkeyPatch) -> None:
    wrapped = FullyShardedOptimizer.__init__

    def meant(self: Any, local: Any, kind: Any, mesh: Any) -> None:
        for number, placed in enumerate(local.placements):
            local.placements[number] = replace(placed, spread=replace(placed.spread, holders=mesh.replicas))
        wrapped(self, local, kind, mesh)

    patch.setattr(FullyShardedOptimizer, "__init__", meant)


def _without_the_copies_of_experts(patch: pytest.MonkeyPatch) -> None:
    right = groups._experts

    def alone(*args: Any) -> dict[str, Any]:
        found = right(*args)
        return found | {"expert_spread": replace(found["expert_spread"], copies=Axis())}

    patch.setattr(groups, "_experts", alone)


def _with_the_gate_of_shared_experts_after_the_sum(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, m: Any, x_TD: torch.Tensor, batch: Batch) -> torch.Tensor:
        out: torch.Tensor = Gated.forward(self, m, x_TD, batch)
        return out * m.weigh(x_TD).sigmoid()

    patch.setattr(SharedExperts, "forward", forward)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any]]] = [
    (_with_added_losses_of_each_micro_batch, {"options": (ONE_SHARED,)}),
    (_with_added_losses_of_each_tp_rank, {"tp": 2, "options": (ONE_SHARED,)}),
    (_with_loads_of_own_tokens, {"cp": 2, "cp_method": "ring", "options": (ONE_SHARED,)}),
    (_with_doubled_gradients_of_experts, {"dp": 2, "ep": 2, "options": (ONE_SHARED,)}),
    (_with_gradients_over_the_holders_of_experts, {"dp": 2, "ep": 2, "zero": 3, "options": (ONE_SHARED,)}),
    (_with_gradients_over_the_holders_of_experts, {"dp": 4, "ep": 2, "zero": 3, "options": (ONE_SHARED,)}),
    (_without_the_copies_of_experts, {"dp": 4, "ep": 2, "dp_shard": 2, "options": (ONE_SHARED,)}),
    (_without_the_copies_of_experts, {"dp": 4, "ep": 2, "dp_shard": 2, "zero": 3, "options": (ONE_SHARED,)}),
    (_with_rows_in_the_order_of_ranks, {"dp": 2, "ep": 2, "options": (ONE_SHARED,)}),
    (_with_a_bias_from_own_loads, {"dp": 2, "zero": 0, "options": (IN_GROUPS,)}),
    (_with_a_bias_of_the_last_micro_batch, {"options": (IN_GROUPS,)}),
    (_with_counts_in_every_forward, {"recompute": "full", "options": (ONE_SHARED,)}),
    (_with_the_experts_bias_on_each_rank, {"tp": 2, "options": (WITH_BIASES,)}),
    (_with_the_gate_of_shared_experts_after_the_sum, {"tp": 2, "options": (AFTER_DENSE,)}),
]
