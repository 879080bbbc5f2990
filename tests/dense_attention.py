"""Attention as its definition says it, with matrices of tokens x tokens: what every kernel is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from triplane.model.batch import Batch
from triplane.model.rule import Rule

PLAIN = Rule(scale=0.3)
RULES = {
    "plain": PLAIN,
    "window": Rule(scale=0.3, window=7),
    "own token": Rule(scale=0.3, window=1),
    "soft cap": Rule(scale=0.3, softcap=2.0),
    "window and soft cap": Rule(scale=0.3, window=70, softcap=0.5),
}


def batch_of(bounds: Sequence[int]) -> Batch:
    ids_T = torch.zeros(bounds[-1], dtype=torch.int64)
    return Batch.build(ids_T, ids_T, bounds)


def dense(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    bounds: Sequence[int],
    rule: Rule,
    bias_HL: Tensor | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    tokens, heads, _ = q_THK.shape
    place_T = torch.arange(tokens)
    segment_T = torch.bucketize(place_T, torch.tensor(bounds[1:]), right=True)
    distance_TT = place_T[:, None] - place_T
    hidden_TT = (distance_TT < 0) | (segment_T[:, None] != segment_T)
    if rule.window is not None:
        hidden_TT |= distance_TT >= rule.window
    k_THK, v_THK = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k_TGK, v_TGK))
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) * rule.scale
    if rule.softcap is not None:
        scores_HTT = rule.softcap * (scores_HTT / rule.softcap).tanh()
    if bias_HL is not None:
        scores_HTT = scores_HTT + bias_HL[:, distance_TT.masked_fill(hidden_TT, 0)]
    scores_HTT = scores_HTT.masked_fill(hidden_TT, float("-inf"))
    if sinks_H is not None:
        scores_HTT = torch.cat((scores_HTT, sinks_H[:, None, None].expand(heads, tokens, 1)), dim=-1)
    return torch.einsum("hts,shk->thk", scores_HTT.softmax(-1)[..., :tokens], v_THK)
