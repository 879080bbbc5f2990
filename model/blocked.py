"""Attention in plain torch with its own backward: any rule on any device, and nothing of size tokens x tokens is kept.

A block of queries meets a block of keys at a time, in a tile of scores (tiles.py). Query heads that share a key head
are rows of one product.

Shapes are those of batch.py, with S keys and L distances; N is runs, R query heads per key head.
Scores are logarithms to base 2, since exp2 costs a third of exp.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from triplane.model.merge import merge
from triplane.model.rule import Rule
from triplane.model.tiles import Span, Tile, add_diagonals, blocks, by_distance, edges, largest

_Result = TypeVar("_Result")

_LOG2E = math.log2(math.e)
_SCORES = 2**19
"""Scores in a tile of several runs, at most: what a core's cache holds."""


def forward(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, spans: Sequence[Span], rule: Rule, bias_HL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns attention (T, H, K) and its lse (H, T), fp32 or wider; no query and no key may be in two spans.

    A query that sees no key, or is in no span, gets 0 and an lse of -inf.
    """
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    out_THK = _empty(q_THK, spans)
    lse_TH1 = q_THK.new_full((*q_THK.shape[:2], 1), -math.inf, dtype=wide)

    def attend(part: Part) -> None:
        qs, outs, lses = (part.queries(x) for x in (q_THK, out_THK, lse_TH1))
        k_NSK, v_NSK = (part.keys(x).squeeze(2).to(wide) for x in (k_SGK, v_SGK))
        bias_RL, space = part.bias(bias_HL), _Space(q_THK.device)
        for block, tiles in blocks(part.span, rule.window):
            q = qs[:, block].flatten(1, 2).to(wide) * _factor(rule)
            out, lse = torch.zeros_like(q), q.new_full((*q.shape[:2], 1), -math.inf)
            for tile in tiles:
                here, here_lse = _attend(_scores(q, k_NSK, tile, rule, bias_RL, space)[0], v_NSK[:, tile.keys])
                if tile is tiles[0]:
                    out, lse = here, here_lse
                else:
                    merge(out, lse.squeeze(-1), here, here_lse.squeeze(-1))
            outs[:, block] = out.view_as(outs[:, block])
            lses[:, block] = lse.view_as(lses[:, block])

    _each(attend, split(spans, k_SGK.shape[1], q_THK, _SCORES), q_THK.device)
    return out_THK, lse_TH1.squeeze(-1).T.contiguous()


def _attend(score: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention and its lse over the keys of a tile; overwrites the scores."""
    limits = torch.finfo(score.dtype)
    highest = score.amax(-1, keepdim=True).clamp_(min=limits.min)
    weight = score.sub_(highest).exp2_()
    total = weight.sum(-1, keepdim=True)
    out = torch.bmm(weight, v).div_(total.clamp(min=limits.tiny))
    return out, highest.add_(total.log2_()).mul_(1 / _LOG2E)


def backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    spans: Sequence[Span],
    rule: Rule,
    bias_HL: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the gradients of q, of k and v in fp32 or wider, and of the bias; spans are as in `forward`.

    `out_THK` and a finite `lse_HT` may be those over further keys; these are then the parts due to `k_SGK` and `v_SGK`.
    """
    wide = lse_HT.dtype
    dq_THK, dk_SGK, dv_SGK = _empty(q_THK, spans), *(x.new_zeros(x.shape, dtype=wide) for x in (k_SGK, v_SGK))

    def differentiate(part: Part) -> Tensor | None:
        by_query = [part.queries(x) for x in (q_THK, grad_THK, out_THK, lse_HT.T.unsqueeze(-1))]
        k_NSK, v_NSK = (part.keys(x).squeeze(2) for x in (k_SGK, v_SGK))
        wide_k_NSK, wide_v_NSK = k_NSK.to(wide), v_NSK.to(wide)
        dqs, dks, dvs = part.queries(dq_THK), part.keys(dk_SGK).squeeze(2), part.keys(dv_SGK).squeeze(2)
        bias_RL, space = part.bias(bias_HL), _Space(q_THK.device)
        dbias_RL = None if bias_RL is None else torch.zeros_like(bias_RL)
        for block, tiles in blocks(part.span, rule.window):
            q, grad, out, lse = (x[:, block].flatten(1, 2) for x in by_query)
            scaled, wide_grad, lse = q.to(wide) * _factor(rule), grad.to(wide), lse * _LOG2E
            lean = (wide_grad * out).sum(-1, keepdim=True)  # what the gradients of a query's scores have in common
            dq = torch.zeros_like(scaled)
            for tile in tiles:
                score, capped = _scores(scaled, wide_k_NSK, tile, rule, bias_RL, space)
                weight = score.sub_(lse).exp2_()
                dvs[:, tile.keys] += torch.bmm(space.rounded(weight, grad.dtype).mT, grad)
                dscore = torch.bmm(wide_grad, wide_v_NSK[:, tile.keys].mT, out=space.like("dscore", weight))
                dscore.sub_(lean).mul_(weight)
                if dbias_RL is not None:
                    add_diagonals(dbias_RL, dscore, tile)
                if capped is not None:
                    dscore.mul_(1 - capped.square())
                rounded = space.rounded(dscore, q.dtype)
                dq += torch.bmm(rounded, k_NSK[:, tile.keys])
                dks[:, tile.keys] += torch.bmm(rounded.mT, q)
            dqs[:, block] = dq.mul_(rule.scale).view_as(dqs[:, block])
        return dbias_RL

    parts = split(spans, k_SGK.shape[1], q_THK, _SCORES)
    dbiases = _each(differentiate, parts, q_THK.device)
    dbias_HL = None if bias_HL is None else torch.zeros_like(bias_HL)
    for part, dbias_RL in zip(parts, dbiases, strict=True):
        if dbias_HL is not None and dbias_RL is not None:
            dbias_HL[part.heads] += dbias_RL
    return dq_THK, dk_SGK.mul_(rule.scale), dv_SGK, dbias_HL


def _empty(q_THK: Tensor, spans: Sequence[Span]) -> Tensor:
    """Returns memory for what has the shape of the queries; zeros where a query may be in no span."""
    queries = sum(span.queries.stop - span.queries.start for span in spans)
    return q_THK.new_empty(q_THK.shape) if queries == len(q_THK) else q_THK.new_zeros(q_THK.shape)


class Part(NamedTuple):
    """The work of one thread: some runs of a span, for the query heads of one key head."""

    span: Span
    group: int
    heads: slice

    def queries(self, x_THK: Tensor) -> Tensor:
        """Returns a view (N, S, R, K)."""
        x_TRK = x_THK[self.span.queries, self.heads]
        return x_TRK.view(self.span.runs, -1, *x_TRK.shape[1:])

    def keys(self, x_SGK: Tensor) -> Tensor:
        """Returns a view (N, S, 1, K)."""
        x_S1K = x_SGK[self.span.keys, self.group : self.group + 1]
        return x_S1K.view(self.span.runs, -1, *x_S1K.shape[1:])

    def bias(self, bias_HL: Tensor | None) -> Tensor | None:
        """Returns the bias (R, L), to base 2 as scores are."""
        return None if bias_HL is None else bias_HL[self.heads] * _LOG2E


def split(spans: Sequence[Span], groups: int, q_THK: Tensor, scores: int) -> list[Part]:
    """Splits the work by key head, and by runs so that a tile has at most so many `scores`, or is of one run."""
    shared = q_THK.shape[1] // groups
    parts: list[Part] = []
    for span in spans:
        queries, keys = ((x.stop - x.start) // span.runs for x in (span.queries, span.keys))
        most = max(scores // (shared * largest(queries, keys)), 1)
        for first in range(0, span.runs, most):
            runs = min(most, span.runs - first)
            query, key = span.queries.start + first * queries, span.keys.start + first * keys
            some = Span(slice(query, query + runs * queries), slice(key, key + runs * keys), span.distance, runs)
            parts += [Part(some, group, slice(group * shared, (group + 1) * shared)) for group in range(groups)]
    return parts


def _each(work: Callable[[Part], _Result], parts: Sequence[Part], device: torch.device) -> list[_Result]:
    """Does the work of each part; on a CPU on as many threads as an operator may use.

    Within an operator threads would meet after each of the many small ones, and wait there for the slowest.
    """
    threads = min(torch.get_num_threads(), len(parts)) if device.type == "cpu" else 1
    if threads <= 1:
        return [work(part) for part in parts]

    def alone(part: Part) -> _Result:
        with torch.no_grad():
            return work(part)

    usual = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        results = list(pool.map(alone, parts))
    torch.set_num_threads(usual)  # for threads that start later; the pool's own setting was for its threads
    return results


class _Space:
    """Memory that tiles use one after another, since fresh memory costs more than the work done in it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        if name not in self._held or len(self._held[name]) < size:
            self._held[name] = torch.empty(size, dtype=dtype, device=self._device)
        return self._held[name][:size].view(*shape)

    def like(self, name: str, x: Tensor) -> Tensor:
        return self.take(name, x.shape, x.dtype)

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x if x.dtype == dtype else self.take("rounded", x.shape, dtype).copy_(x)


def _factor(rule: Rule) -> float:
    """Returns the factor of queries before the product: a soft cap takes the tangent of it, exp2 its power."""
    return rule.scale * _LOG2E if rule.softcap is None else rule.scale / rule.softcap


def _scores(
    q: Tensor, k_NSK: Tensor, tile: Tile, rule: Rule, bias_RL: Tensor | None, space: _Space
) -> tuple[Tensor, Tensor | None]:
    """Returns the scores (N, rows x R, columns) of scaled queries, and with a soft cap their tangents."""
    score, capped = space.take("score", (*q.shape[:2], tile.columns), q.dtype), None
    torch.bmm(q, k_NSK[:, tile.keys].mT, out=score)
    if rule.softcap is not None:
        capped = score.tanh_()
        score = capped * (rule.softcap * _LOG2E)
    by_head = score.view(len(score), tile.rows, -1, tile.columns)
    if bias_RL is not None:
        by_head += by_distance(tile, rule.window, bias_RL).transpose(0, 1)
    else:
        for edge in edges(tile, rule.window):
            columns = slice(edge.keys.start - tile.keys.start, edge.keys.stop - tile.keys.start)
            by_head[..., columns] += by_distance(edge, rule.window, score.new_zeros(1, 1)).transpose(0, 1)
    return score, capped
