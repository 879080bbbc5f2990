"""Chooses the experts of each token, and adds the losses that this takes to the objective.

The losses do not travel with the residual stream: the weights of the experts pass a function that gives the losses
their gradient, so that they count once a micro-batch, wherever a pipeline or recomputation runs the layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triplane.model.batch import Batch

if TYPE_CHECKING:
    from triplane.model.modules import PartModule
    from triplane.model.parts.experts import Experts

_TINY = 1e-20
"""Keeps the sum of a token's scores from zero."""


def route(part: Experts, m: PartModule, x_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the numbers of each token's experts and their weights in fp32, both (T, A)."""
    logits_TE = m.router(x_TD)
    scores_TE = logits_TE.softmax(-1) if part.router == "softmax" else logits_TE.sigmoid()
    ranked_TE = scores_TE.detach()
    if part.biased:
        ranked_TE = ranked_TE + m.router.selection_bias
    experts_TA = chosen(part, ranked_TE)
    weights_TA = scores_TE.gather(1, experts_TA)
    if part.normalise:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + _TINY)
    weights_TA = weights_TA * part.routed_scale
    if batch.scale is None or m.tally is None:
        return experts_TA, weights_TA
    loads_TE = torch.zeros_like(scores_TE.detach()).scatter(1, experts_TA, 1.0)
    share_TE = scores_TE if part.router == "softmax" else scores_TE / (scores_TE.sum(-1, keepdim=True) + _TINY)
    losses = part.z_loss_weight * logits_TE.logsumexp(-1).square().sum()
    if part.imbalance_weight:
        losses = losses + part.imbalance_weight * _imbalance(part, m, batch, loads_TE=loads_TE, share_TE=share_TE)
    with torch.no_grad():
        entropy = -torch.xlogy(share_TE, share_TE).sum()
        tally = torch.cat((torch.stack((losses, entropy)), loads_TE.sum(0)))
    return experts_TA, _Counted.apply(weights_TA, losses, m.tally, tally, batch.scale / m.copies)  # type: ignore[no-untyped-call]


def chosen(part: Experts, scores_TE: Tensor) -> Tensor:
    """Returns the numbers of the experts with the best scores, of the best groups if there are several."""
    if part.groups > 1:
        scores_TGE = scores_TE.view(len(scores_TE), part.groups, -1)
        groups_TG = scores_TGE.topk(part.group_best).values.sum(-1).topk(part.active_groups).indices
        kept_TG = torch.zeros_like(scores_TGE[..., 0], dtype=torch.bool).scatter(1, groups_TG, True)
        scores_TE = scores_TGE.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
    return scores_TE.topk(part.active).indices


def _imbalance(part: Experts, m: PartModule, batch: Batch, *, loads_TE: Tensor, share_TE: Tensor) -> Tensor:
    """Returns the sum over tokens of load times score: S times sum f P of each sequence of S tokens."""
    numbers_B = torch.arange(batch.sequences, device=loads_TE.device)
    in_sequence_BT = (batch.sequences_T == numbers_B[:, None]).float()
    loads_BE = m.summed_along(in_sequence_BT @ loads_TE)
    equal = batch.bounds[-1] / batch.sequences * part.active / part.n_experts
    return ((loads_BE / equal)[batch.sequences_T] * share_TE).sum()


class _Counted(torch.autograd.Function):
    """Returns the weights; in backward gives the losses their gradient, and adds to that of `total` the tally."""

    @staticmethod
    def forward(ctx: Any, weights_TA: Tensor, losses: Tensor, total: Tensor, tally: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(tally)
        ctx.scale = scale
        return weights_TA.view_as(weights_TA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TA: Tensor) -> tuple[Tensor | None, ...]:
        (tally,) = ctx.saved_tensors
        return grad_TA, tally.new_full((), ctx.scale), tally, None, None
