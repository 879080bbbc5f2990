"""Attention on a CPU in compiled blocks: tiles as in blocked.py, whose work between products is one compiled pass.

Products are in the dtype of the inputs, but scores in fp32: rounded to bf16, large ones would err most.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from triplane.model.blocked import split
from triplane.model.merge import merge
from triplane.model.rule import Rule
from triplane.model.tiles import Span, Tile, blocks

_LOG2E = math.log2(math.e)
LONGEST = 1024
"""Tokens of a segment without a window up to which this is no slower than SDPA's kernel."""
_SCORES = 2**20
"""Scores in a tile of several runs, at most: few tiles, each of which costs a call, but memory that is used again."""


def forward(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, spans: Sequence[Span], rule: Rule) -> tuple[Tensor, Tensor]:
    """Returns attention (T, H, K) and its lse (H, T), fp32 or wider; each query is in one span, as its own key."""
    attend, _ = _compiled()
    out_THK = torch.empty_like(q_THK)
    lse_TH1 = q_THK.new_empty((*q_THK.shape[:2], 1), dtype=torch.promote_types(q_THK.dtype, torch.float32))
    for part in split(spans, k_TGK.shape[1], q_THK, _SCORES):
        qs, outs, lses = (part.queries(x) for x in (q_THK, out_THK, lse_TH1))
        k_NSK, v_NSK = (part.keys(x).squeeze(2).contiguous() for x in (k_TGK, v_TGK))
        for block, tiles in blocks(part.span, rule.window):
            q = qs[:, block].flatten(1, 2)
            found = [
                attend(q, k_NSK[:, tile.keys], v_NSK[:, tile.keys], _places(q, tile), rule.scale, rule.window)
                for tile in tiles
            ]
            out, lse = found[0]
            if len(tiles) > 1:
                out, lse = out.to(lse.dtype), lse.squeeze(-1)
                for other, other_lse in found[1:]:
                    merge(out, lse, other, other_lse.squeeze(-1))
            outs[:, block] = out.view_as(outs[:, block])
            lses[:, block] = lse.view_as(lses[:, block])
    return out_THK, lse_TH1.squeeze(-1).T.contiguous()


def backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    spans: Sequence[Span],
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; those of k and v in fp32 or wider."""
    _, differentiate = _compiled()
    dq_THK, dk_TGK, dv_TGK = (
        torch.empty_like(q_THK),
        *(x.new_zeros(x.shape, dtype=lse_HT.dtype) for x in (k_TGK, v_TGK)),
    )
    for part in split(spans, k_TGK.shape[1], q_THK, _SCORES):
        by_query = [part.queries(x) for x in (grad_THK, q_THK, out_THK, lse_HT.T.unsqueeze(-1))]
        k_NSK, v_NSK = (part.keys(x).squeeze(2).contiguous() for x in (k_TGK, v_TGK))
        dqs, dks, dvs = part.queries(dq_THK), part.keys(dk_TGK).squeeze(2), part.keys(dv_TGK).squeeze(2)
        for block, tiles in blocks(part.span, rule.window):
            grad, q, out, lse = (x[:, block].flatten(1, 2) for x in by_query)
            dq = lse.new_zeros(q.shape)
            for tile in tiles:
                k, v = k_NSK[:, tile.keys], v_NSK[:, tile.keys]
                more_q, more_k, more_v = differentiate(
                    grad, q, k, v, out, lse, _places(q, tile), rule.scale, rule.window
                )
                dq += more_q
                dks[:, tile.keys].add_(more_k, alpha=rule.scale)
                dvs[:, tile.keys] += more_v
            dqs[:, block] = (dq * rule.scale).view_as(dqs[:, block])
    return dq_THK, dk_TGK, dv_TGK


@cache
def _compiled() -> tuple[Callable[..., tuple[Tensor, ...]], ...]:
    return torch.compile(_attend, dynamic=True), torch.compile(_differentiate, dynamic=True)


def _places(q: Tensor, tile: Tile) -> Tensor:
    """Returns the column of a tile that holds the key at each row's own place, (rows, 1); fp32, as lanes compare it."""
    places = torch.arange(tile.distance, tile.distance + tile.rows, dtype=torch.float32)
    return places.repeat_interleave(q.shape[1] // tile.rows).unsqueeze(-1)


def _attend(q: Tensor, k: Tensor, v: Tensor, places: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """Returns attention and its lse over the keys of a tile."""
    score = _scores(q, k, places, scale, window)
    limits = torch.finfo(score.dtype)
    highest = score.amax(-1, keepdim=True).clamp(min=limits.min)
    weight = (score - highest).exp2()
    total = weight.sum(-1, keepdim=True)
    out = torch.bmm(weight.to(v.dtype), v) / total.clamp(min=limits.tiny)
    return out.to(q.dtype), (highest + total.log2()) / _LOG2E


def _differentiate(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    places: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what a tile adds to the gradients of q, k and v, the first two without the factor `scale`."""
    weight = (_scores(q, k, places, scale, window) - lse * _LOG2E).exp2()
    lean = (grad.to(lse.dtype) * out).sum(-1, keepdim=True)  # what the gradients of a query's scores have in common
    dscore = (weight * (torch.bmm(grad, v.mT) - lean)).to(q.dtype)
    return torch.bmm(dscore, k), torch.bmm(dscore.mT, q), torch.bmm(weight.to(grad.dtype).mT, grad)


def _scores(q: Tensor, k: Tensor, places: Tensor, scale: float, window: int | None) -> Tensor:
    """Returns the scores of a tile as logarithms to base 2, fp32 or wider; -inf where the rule hides the key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    score = torch.bmm(q.to(wide), k.to(wide).mT) * (scale * _LOG2E)
    columns = torch.arange(k.shape[1], dtype=torch.float32)
    seen = columns <= places
    if window is not None:
        seen = seen & (columns > places - window)
    return score.where(seen, -math.inf)
