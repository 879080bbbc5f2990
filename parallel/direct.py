"""Attention over a zig-zag share by rules that flash kernels lack: each rank gets the keys that its queries see.

In hop h each rank sends keys and values to the rank h places on, those that one's queries see, so that a window costs
what it holds and not the whole stream; hops in which no rank sees anything are left out.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from triplane.model import blocked, sinks
from triplane.model.batch import Batch
from triplane.model.merge import merge
from triplane.model.rule import Rule
from triplane.parallel.mesh import Axis
from triplane.parallel.zigzag import Seen, Share, seen


def attend_directly(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    batch: Batch,
    rule: Rule,
    cp: Axis,
    bias_HL: Tensor | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Computes what SegmentAttention computes, on this rank's share of the tokens."""
    hops = _hops(batch, cp, len(q_THK), rule.window)
    return _Direct.apply(q_THK, k_TGK, v_TGK, bias_HL, sinks_H, hops, rule)  # type: ignore[no-untyped-call]


class _Hop:
    """Keys that this rank reads `distance` ranks before it, and that the rank as far after it reads here."""

    def __init__(self, cp: Axis, distance: int, read: Seen, sent: Seen):
        self.read, self.sent = read, sent
        self.cp, self.distance = cp, distance

    def fetch(self, own: Tensor) -> Callable[[], Tensor]:
        """Starts the exchange of keys and values; the returned function waits for those to read."""
        there = torch.cat([own[keys] for keys in self.sent.keys]) if self.sent.keys else own[:0]
        return self._exchange(there, self.read.tokens, onward=True) if self.distance else lambda: there

    def give_back(self, grads: Tensor) -> Callable[[], Tensor]:
        """Starts the exchange of gradients; the returned function waits for those of what was sent."""
        return self._exchange(grads, self.sent.tokens, onward=False) if self.distance else lambda: grads

    def _exchange(self, x: Tensor, tokens: int, *, onward: bool) -> Callable[[], Tensor]:
        received = x.new_empty(tokens, *x.shape[1:])
        after, before = ((self.cp.rank + way * self.distance) % self.cp.size for way in (1, -1))
        to, of = (after, before) if onward else (before, after)
        into, out = ([n * (rank == peer) for rank in range(self.cp.size)] for n, peer in ((tokens, of), (len(x), to)))
        work = dist.all_to_all_single(received, x, into, out, group=self.cp.group, async_op=True)
        assert work is not None

        def arrived() -> Tensor:
            work.wait()
            return received

        return arrived


def _hops(batch: Batch, cp: Axis, tokens: int, window: int | None) -> list[_Hop]:
    shares = [Share(rank, cp.size, tokens // 2) for rank in range(cp.size)]

    def read(reader: int, hop: int) -> Seen:
        return seen(batch.bounds, shares[reader % cp.size], shares[(reader - hop) % cp.size], window)

    # All ranks must agree on the hops, since all take part in each.
    useful = [hop for hop in range(cp.size) if any(read(rank, hop).keys for rank in range(cp.size))]
    return [_Hop(cp, hop, read(cp.rank, hop), read(cp.rank + hop, hop)) for hop in useful]


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        bias_HL: Tensor | None,
        sinks_H: Tensor | None,
        hops: list[_Hop],
        rule: Rule,
    ) -> Tensor:
        ctx.hops, ctx.rule = hops, rule
        own = torch.stack((k_TGK, v_TGK), dim=1)
        wide = torch.promote_types(q_THK.dtype, torch.float32)
        out_THK = q_THK.new_zeros(q_THK.shape, dtype=wide)
        lse_HT = out_THK.new_full((q_THK.shape[1], len(q_THK)), float("-inf"))
        for hop, kv in _fetched(hops, own):
            for spans in hop.read.spans:
                part, part_lse = blocked.forward(q_THK, kv[:, 0], kv[:, 1], spans, rule, bias_HL)
                merge(out_THK, lse_HT.T, part, part_lse.T)
        if sinks_H is not None:
            out_THK, lse_HT = sinks.join(out_THK, lse_HT, sinks_H)
        out_THK = out_THK.to(q_THK.dtype)
        ctx.save_for_backward(q_THK, own, bias_HL, sinks_H, out_THK, lse_HT)
        return out_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THK: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, own, bias_HL, sinks_H, out_THK, lse_HT = ctx.saved_tensors
        dq_THK, down = (x.new_zeros(x.shape, dtype=lse_HT.dtype) for x in (q_THK, own))
        dbias_HL = None if bias_HL is None else torch.zeros_like(bias_HL)
        returning: deque[tuple[_Hop, Callable[[], Tensor]]] = deque()
        for hop, kv in _fetched(ctx.hops, own):
            down_there = torch.zeros_like(kv, dtype=lse_HT.dtype)
            for spans in hop.read.spans:
                known = (grad_THK, q_THK, kv[:, 0], kv[:, 1], out_THK, lse_HT)
                dq, dk, dv, dbias = blocked.backward(*known, spans, ctx.rule, bias_HL)
                dq_THK += dq
                down_there += torch.stack((dk, dv), dim=1)
                if dbias_HL is not None and dbias is not None:
                    dbias_HL += dbias
            returning.append((hop, hop.give_back(down_there)))
            if len(returning) > 1:
                _add(down, *returning.popleft())
        _add(down, *returning.pop())
        dsinks_H = None if sinks_H is None else sinks.gradient(grad_THK, out_THK, lse_HT, sinks_H)
        dk_TGK, dv_TGK = down.to(own.dtype).unbind(1)
        return dq_THK.to(q_THK.dtype), dk_TGK, dv_TGK, dbias_HL, dsinks_H, None, None


def _add(down: Tensor, hop: _Hop, arrived: Callable[[], Tensor]) -> None:
    """Adds the gradients of the keys and values that were sent."""
    parts = torch.split(arrived(), [keys.stop - keys.start for keys in hop.sent.keys])
    for keys, part in zip(hop.sent.keys, parts, strict=True):
        down[keys] += part


def _fetched(hops: list[_Hop], own: Tensor) -> Iterator[tuple[_Hop, Tensor]]:
    """Yields each hop and the keys and values that it reads, while those of the next are in flight."""
    arrived = hops[0].fetch(own)
    for hop, following in pairwise(hops):
        kv, arrived = arrived(), following.fetch(own)
        yield hop, kv
    yield hops[-1], arrived()
