"""Ring attention (Liu et al. 2023): keys and values travel around the cp ranks, queries stay.

A rank holds two chunks of the stream, one early and one late (context.py), so that every hop costs
every rank the same. A share keeps the order of the stream, so to its own keys a rank attends causally
within its part of each document. Between two ranks, at most one document reaches from the earlier
chunks into the later ones, and there each query sees each key.

This is the ring of plain causal attention, by flash kernels; direct.py has what they lack.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from triplane.model import flash, sinks
from triplane.model.attend import SegmentAttention
from triplane.model.batch import Batch
from triplane.model.merge import merge
from triplane.model.rule import Rule
from triplane.parallel.direct import attend_directly
from triplane.parallel.mesh import Axis
from triplane.parallel.zigzag import Share


class RingAttention(nn.Module):
    """Replaces a SegmentAttention `core`, on this rank's zig-zag share of the tokens."""

    def __init__(self, core: SegmentAttention, cp: Axis):
        super().__init__()
        assert cp.group is not None, "a ring needs two ranks"
        self.rule = core.rule
        self.cp = cp

    # The compiler cannot trace sends and receives; it compiles the block before and after them.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        batch: Batch,
        bias_HL: Tensor | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        rule = self.rule.within(batch.longest)
        half = q_THK.dtype in (torch.float16, torch.bfloat16)
        if rule.window is None and rule.softcap is None and bias_HL is None and (half or not q_THK.is_cuda):
            return _Ring.apply(q_THK, k_TGK, v_TGK, sinks_H, batch, rule, self.cp)  # type: ignore[no-untyped-call]
        return attend_directly(q_THK, k_TGK, v_TGK, batch, rule, self.cp, bias_HL, sinks_H)


class Pair(NamedTuple):
    """This rank's queries, with the keys that they see: all keys of another rank's, or own keys within segments."""

    queries: slice
    keys: slice
    segments: flash.Segments | None


def pairs(batch: Batch, cp: Axis, tokens: int) -> dict[int, Pair]:
    """Returns, by rank, what to compute when that rank's keys arrive; nothing where no document is shared."""
    shares = [Share(rank, cp.size, tokens // 2) for rank in range(cp.size)]
    mine = shares[cp.rank]
    found = {cp.rank: Pair(slice(0, tokens), slice(0, tokens), mine.segments(batch))}
    for theirs in shares:
        if theirs.rank == cp.rank:
            continue
        if theirs.rank < cp.rank:  # their early chunk precedes both of mine, their late one follows
            edge, first_query, last_key = theirs.early + theirs.chunk, 0, theirs.chunk
        else:  # both of theirs lie between my early and my late chunk
            edge, first_query, last_key = mine.late, mine.chunk, tokens
        after = bisect_right(batch.bounds, edge)
        start, stop = batch.bounds[after - 1], batch.bounds[after]  # the document at the edge
        queries, keys = slice(first_query, mine.before(stop)), slice(theirs.before(start), last_key)
        if queries.start < queries.stop and keys.start < keys.stop:
            found[theirs.rank] = Pair(queries, keys, None)
    return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        sinks_H: Tensor | None,
        batch: Batch,
        rule: Rule,
        cp: Axis,
    ) -> Tensor:
        ctx.rule, ctx.cp = rule, cp
        ctx.pairs = pairs(batch, cp, len(q_THK))
        own = torch.stack((k_TGK, v_TGK))
        wide = torch.promote_types(q_THK.dtype, torch.float32)
        out_THK = torch.zeros_like(q_THK, dtype=wide)
        lse_HT = out_THK.new_full((q_THK.shape[1], len(q_THK)), float("-inf"))
        for rank, (k, v) in _around(own, cp):
            if rank in ctx.pairs:
                queries, keys, segments = ctx.pairs[rank]
                part, part_lse = flash.forward(q_THK[queries], k[keys], v[keys], segments, rule)
                merge(out_THK[queries], lse_HT.T[queries], part, part_lse.T)
        if sinks_H is not None:
            out_THK, lse_HT = sinks.join(out_THK, lse_HT, sinks_H)
        out_THK = out_THK.to(q_THK.dtype)
        ctx.save_for_backward(q_THK, own, out_THK, lse_HT, sinks_H)
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, own, out_THK, lse_HT, sinks_H = ctx.saved_tensors
        grad_THK = grad_THK.contiguous()
        dq_THK = torch.zeros_like(q_THK, dtype=lse_HT.dtype)
        arrived: Callable[[], Tensor] | None = None
        # Gradients travel one hop behind their keys and values, and need one more hop to reach the owner.
        for rank, (k, v) in _around(own, ctx.cp):
            grads = torch.zeros_like(own, dtype=lse_HT.dtype)
            if rank in ctx.pairs:
                queries, keys, segments = ctx.pairs[rank]
                here = (grad_THK[queries], q_THK[queries], k[keys], v[keys], out_THK[queries], lse_HT[:, queries])
                dq, grads[0, keys], grads[1, keys] = flash.backward(*here, segments, ctx.rule)
                dq_THK[queries] += dq
            if arrived is not None:
                grads += arrived()
            arrived = pass_on(grads, ctx.cp)
        assert arrived is not None
        dk_TGK, dv_TGK = arrived().to(own.dtype)
        dsinks_H = None if sinks_H is None else sinks.gradient(grad_THK, out_THK, lse_HT, sinks_H)
        return dq_THK.to(q_THK.dtype), dk_TGK, dv_TGK, dsinks_H, None, None, None


def _around(own: Tensor, cp: Axis) -> Iterator[tuple[int, Tensor]]:
    """Yields each rank and its tensor, this rank's first, while the next one is in flight."""
    x = own
    for hop in range(cp.size - 1):
        arrived = pass_on(x, cp)
        yield (cp.rank - hop) % cp.size, x
        x = arrived()
    yield (cp.rank + 1) % cp.size, x


def pass_on(x: Tensor, cp: Axis) -> Callable[[], Tensor]:
    """Starts sending `x` to the next rank; the returned function waits for the previous rank's tensor."""
    received = torch.empty_like(x)
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x, group=cp.group, group_peer=(cp.rank + 1) % cp.size),
            dist.P2POp(dist.irecv, received, group=cp.group, group_peer=(cp.rank - 1) % cp.size),
        ]
    )

    def arrived() -> Tensor:
        for work in works:
            work.wait()
        return received

    return arrived
