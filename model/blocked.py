"""Attention in plain torch with its own backward: any rule on any device, and nothing of size tokens x tokens is kept.

A block of queries meets a block of keys at a time, in a tile of scores; tiles that the rule hides are skipped.
Query heads that share a key head are rows of one product. Mask and bias depend on a query's distance from a key
alone, so they are one vector, of which each row of a tile holds a part, one place further than the row above.

Shapes are those of batch.py, with S keys and L distances; N is runs x key heads, R query heads per key head.
Scores are logarithms to base 2, since exp2 costs a third of exp.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from triplane.model.merge import merge
from triplane.model.rule import Rule

_LOG2E = math.log2(math.e)
_QUERIES, _KEYS = 64, 512
"""Sides of a tile."""
_SCORES = 2**21
"""Scores of all runs and heads in a tile, at most, as long as there are several runs."""


class Span(NamedTuple):
    """Runs of queries, each against its run of keys; in a tensor the runs follow one another."""

    queries: slice
    keys: slice
    distance: int = 0
    """The place of a run's first query, less that of its first key."""
    runs: int = 1


def spans_within(bounds: Sequence[int]) -> list[Span]:
    """Returns each segment against itself; neighbours of one length are runs of one span."""
    spans = []
    for length, segments in groupby(pairwise(bounds), key=lambda segment: segment[1] - segment[0]):
        starts = [start for start, _ in segments]
        if length:
            tokens = slice(starts[0], starts[-1] + length)
            spans.append(Span(tokens, tokens, runs=len(starts)))
    return spans


def forward(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, spans: Sequence[Span], rule: Rule, bias_HL: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns attention (T, H, K) and its lse (H, T), fp32 or wider; no query may be in two spans.

    A query that sees no key, or is in no span, gets 0 and an lse of -inf.
    """
    groups, wide = k_SGK.shape[1], _wide(q_THK)
    out_THK = _empty(q_THK, spans)
    lse_TH = q_THK.new_full(q_THK.shape[:2], -math.inf, dtype=wide)
    space = _Space(q_THK.device)
    for span in _parts(spans, q_THK.shape[1]):
        qs, outs, lses = (_by_run(x, span.queries, span, groups) for x in (q_THK, out_THK, lse_TH.unsqueeze(-1)))
        k_NSK, v_NSK = (_by_run(x, span.keys, span, groups).flatten(0, 1).squeeze(2).to(wide) for x in (k_SGK, v_SGK))
        for block, tiles in _blocks(span, rule.window):
            q = _rows(qs, block).to(wide) * _factor(rule)
            out, lse = torch.zeros_like(q), q.new_full((*q.shape[:2], 1), -math.inf)
            for tile in tiles:
                part, part_lse = _attend(_scores(q, k_NSK, tile, rule, bias_HL, space)[0], v_NSK[:, tile.keys])
                if tile is tiles[0]:
                    out, lse = part, part_lse
                else:
                    merge(out, lse.squeeze(-1), part, part_lse.squeeze(-1))
            outs[:, :, block] = out.view_as(outs[:, :, block])
            lses[:, :, block] = lse.view_as(lses[:, :, block])
    return out_THK, lse_TH.T.contiguous()


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
    """Returns the gradients of q, of k and v in fp32 or wider, and of the bias; no query may be in two spans.

    `out_THK` and a finite `lse_HT` may be those over further keys; these are then the parts due to `k_SGK` and `v_SGK`.
    """
    groups, wide = k_SGK.shape[1], lse_HT.dtype
    dq_THK = _empty(q_THK, spans)
    dk_SGK, dv_SGK = (x.new_zeros(x.shape, dtype=wide) for x in (k_SGK, v_SGK))
    dbias_HL = None if bias_HL is None else torch.zeros_like(bias_HL)
    space = _Space(q_THK.device)
    for span in _parts(spans, q_THK.shape[1]):
        of_queries = (q_THK, grad_THK, out_THK, lse_HT.T.unsqueeze(-1))
        by_query = [_by_run(x, span.queries, span, groups) for x in of_queries]
        k_NSK, v_NSK = (_by_run(x, span.keys, span, groups).flatten(0, 1).squeeze(2) for x in (k_SGK, v_SGK))
        wide_k_NSK, wide_v_NSK = k_NSK.to(wide), v_NSK.to(wide)
        dqs = _by_run(dq_THK, span.queries, span, groups)
        dks, dvs = (_by_run(x, span.keys, span, groups).squeeze(3) for x in (dk_SGK, dv_SGK))
        for block, tiles in _blocks(span, rule.window):
            q, grad, out, lse = (_rows(x, block) for x in by_query)
            scaled, wide_grad, lse = q.to(wide) * _factor(rule), grad.to(wide), lse * _LOG2E
            lean = (wide_grad * out).sum(-1, keepdim=True)  # what the gradients of a query's scores have in common
            dq = torch.zeros_like(scaled)
            for tile in tiles:
                score, capped = _scores(scaled, wide_k_NSK, tile, rule, bias_HL, space)
                weight = score.sub_(lse).exp2_()
                dv, dk = dvs[:, :, tile.keys], dks[:, :, tile.keys]
                dv += torch.bmm(space.rounded(weight, grad.dtype).mT, grad).view_as(dv)
                dscore = torch.bmm(wide_grad, wide_v_NSK[:, tile.keys].mT, out=space.like("dscore", weight))
                dscore.sub_(lean).mul_(weight)
                if dbias_HL is not None:
                    _add_diagonals(dbias_HL, dscore, tile, span.runs)
                if capped is not None:
                    dscore.mul_(1 - capped.square())
                rounded = space.rounded(dscore, q.dtype)
                dq += torch.bmm(rounded, k_NSK[:, tile.keys])
                dk += torch.bmm(rounded.mT, q).view_as(dk)
            dqs[:, :, block] = dq.mul_(rule.scale).view_as(dqs[:, :, block])
    return dq_THK, dk_SGK.mul_(rule.scale), dv_SGK, dbias_HL


def _empty(q_THK: Tensor, spans: Sequence[Span]) -> Tensor:
    """Returns memory for what has the shape of the queries; zeros where a query may be in no span."""
    queries = sum(span.queries.stop - span.queries.start for span in spans)
    return q_THK.new_empty(q_THK.shape) if queries == len(q_THK) else q_THK.new_zeros(q_THK.shape)


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


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class _Tile(NamedTuple):
    keys: slice
    """In a run."""
    rows: int
    """Queries."""
    distance: int
    """Of the first query from the first key."""

    @property
    def columns(self) -> int:
        return self.keys.stop - self.keys.start

    @property
    def farthest(self) -> int:
        """The last query's distance from the first key; `rows + columns - 1` distances end with it."""
        return self.distance + self.rows - 1


def _parts(spans: Sequence[Span], heads: int) -> Iterator[Span]:
    """Splits spans of many runs, so that tiles fit into a cache."""
    for span in spans:
        queries, keys = (x.stop - x.start for x in (span.queries, span.keys))
        rows, columns = queries // span.runs, keys // span.runs
        most = max(_SCORES // (heads * min(rows, _QUERIES) * min(columns, _KEYS)), 1)
        for first in range(0, span.runs, most):
            runs = min(most, span.runs - first)
            start, key = span.queries.start + first * rows, span.keys.start + first * columns
            yield Span(slice(start, start + runs * rows), slice(key, key + runs * columns), span.distance, runs)


def _blocks(span: Span, window: int | None) -> Iterator[tuple[slice, list[_Tile]]]:
    """Yields blocks of a run's queries, with tiles over the keys that some of them see."""
    queries, keys = ((x.stop - x.start) // span.runs for x in (span.queries, span.keys))
    for start in range(0, queries, _QUERIES):
        stop = min(start + _QUERIES, queries)
        nearest = min(stop + span.distance, keys)
        farthest = 0 if window is None else max(start + span.distance - window + 1, 0)
        tiles = [
            _Tile(slice(key, min(key + _KEYS, nearest)), stop - start, start + span.distance - key)
            for key in range(farthest, nearest, _KEYS)
        ]
        yield slice(start, stop), tiles


def _by_run(x_THK: Tensor, tokens: slice, span: Span, groups: int) -> Tensor:
    """Returns a view (runs, G, S, R, K) of tokens; its first two dims together are N."""
    x_THK = x_THK[tokens]
    return x_THK.view(span.runs, -1, groups, x_THK.shape[1] // groups, x_THK.shape[2]).transpose(1, 2)


def _rows(by_run: Tensor, block: slice) -> Tensor:
    """Returns (N, rows x R, K) of a block of queries."""
    return by_run[:, :, block].flatten(2, 3).flatten(0, 1)


def _factor(rule: Rule) -> float:
    """What queries are multiplied by before the product: a soft cap takes the tangent of it, exp2 its power."""
    return rule.scale * _LOG2E if rule.softcap is None else rule.scale / rule.softcap


def _scores(
    q: Tensor, k_NSK: Tensor, tile: _Tile, rule: Rule, bias_HL: Tensor | None, space: _Space
) -> tuple[Tensor, Tensor | None]:
    """Returns the scores (N, rows x R, columns) of scaled queries, and with a soft cap their tangents."""
    score, capped = space.take("score", (*q.shape[:2], tile.columns), q.dtype), None
    torch.bmm(q, k_NSK[:, tile.keys].mT, out=score)
    if rule.softcap is not None:
        capped = score.tanh_()
        score = capped * (rule.softcap * _LOG2E)
    heads_last = score.view(len(score), tile.rows, -1, tile.columns)
    if bias_HL is not None:
        added = _by_distance(tile, rule.window, bias_HL)
        by_group = added.view(-1, heads_last.shape[2], *added.shape[1:]).transpose(1, 2)
        heads_last.view(-1, *by_group.shape).add_(by_group)
    else:
        for edge in _edges(tile, rule.window):
            columns = slice(edge.keys.start - tile.keys.start, edge.keys.stop - tile.keys.start)
            heads_last[..., columns].add_(_by_distance(edge, rule.window, score.new_zeros(1, 1)).unsqueeze(2))
    return score, capped


def _edges(tile: _Tile, window: int | None) -> Iterator[_Tile]:
    """Yields the parts of a tile, whole columns, in which some query does not see some key."""
    near = max(tile.distance + 1, 0)
    if near < tile.columns:
        yield _Tile(slice(tile.keys.start + near, tile.keys.stop), tile.rows, tile.distance - near)
    if window is not None and tile.farthest >= window:
        far = min(tile.farthest + 1 - window, tile.columns)
        yield _Tile(slice(tile.keys.start, tile.keys.start + far), tile.rows, tile.distance)


def _by_distance(tile: _Tile, window: int | None, bias_HL: Tensor) -> Tensor:
    """Returns what is added to a tile's scores, (H, rows, columns): the bias, and -inf where the rule hides the key."""
    distance_M = torch.arange(tile.farthest, tile.distance - tile.columns, -1, device=bias_HL.device)
    hidden_M = distance_M < 0 if window is None else (distance_M < 0) | (distance_M >= window)
    added_HM = bias_HL[:, distance_M.clamp(0, bias_HL.shape[1] - 1)] * _LOG2E
    return added_HM.masked_fill_(hidden_M, -math.inf).unfold(-1, tile.columns, 1).flip(-2)


def _add_diagonals(dbias_HL: Tensor, dscore: Tensor, tile: _Tile, runs: int) -> None:
    """Adds the sum over each diagonal of a tile to the bias of that distance; hidden scores have no gradient."""
    heads = len(dbias_HL)
    by_run = dscore.view(runs, len(dscore) // runs, tile.rows, -1, tile.columns)
    dscore_HQS = by_run.sum(0).transpose(1, 2).flatten(0, 1)
    distances = tile.rows + tile.columns - 1
    # Rows one place shorter than those of the buffer put a diagonal into a column.
    skewed = dscore.new_zeros(heads, tile.rows, distances)
    strides = (tile.rows * distances, distances - 1, 1)
    skewed.as_strided(dscore_HQS.shape, strides, tile.rows - 1).copy_(dscore_HQS)
    sums_HM = skewed.sum(1).flip(-1)  # from the nearest distance on, which may be negative
    nearest = tile.farthest + 1 - distances
    seen = max(nearest, 0)
    dbias_HL[:, seen : tile.farthest + 1] += sums_HM[:, seen - nearest :]
