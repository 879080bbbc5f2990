"""The core of attention, by the kernel that can do the rule. batch.py has the shape legend."""

from inspect import signature
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from triplane.model import flex, fused
from triplane.model.batch import Batch
from triplane.model.documents import attend_documents
from triplane.model.rule import Rule

_GROUPED_QUERIES: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""torch 2.11 accepts fewer key and value heads than query heads without this option."""

Kernel = Literal["sdpa", "varlen", "flash", "flex", "fused", "blocked"]


class SegmentAttention(nn.Module):
    """Causal attention within each segment, by one rule; another implementation can replace the module."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.rule = rule
        self._scale, self._softcap = repr(rule.scale), None if rule.softcap is None else repr(rule.softcap)

    def forward(
        self,
        q_THK: Tensor,
        k_TGK: Tensor,
        v_TGK: Tensor,
        batch: Batch,
        bias_HL: Tensor | None = None,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Returns (T, H, K).

        `bias_HL`, fp32, is added to the scores by query head and distance, from 0 to `batch.longest` - 1 at least.
        `sinks_H` are logits that take part in the softmax of each query of their head, without a value.
        """
        assert bias_HL is None or bias_HL.shape[1] >= batch.longest, (bias_HL.shape, batch.longest)
        rule = self.rule.within(batch.longest)
        device, dtype, head_dim = q_THK.device.type, q_THK.dtype, q_THK.shape[-1]
        short = batch.longest <= fused.LONGEST
        kernel = choose(device, dtype, head_dim, rule, uniform=batch.uniform, short=short, bias=bias_HL, sinks=sinks_H)
        if kernel == "sdpa":
            return _sdpa(q_THK, k_TGK, v_TGK, batch, rule)
        if kernel == "varlen":
            return _varlen(q_THK, k_TGK, v_TGK, batch, rule)
        if kernel == "flex":
            numbers = (rule.window, self._scale, self._softcap)
            return flex.attend(q_THK, k_TGK, v_TGK, bias_HL, sinks_H, batch.bounds_int32, *numbers)
        segments = (batch.bounds_int32, batch.longest)
        parts = (rule.scale, rule.window, rule.softcap)
        return attend_documents(q_THK, k_TGK, v_TGK, bias_HL, sinks_H, *segments, kernel, *parts)[0]


def choose(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    rule: Rule,
    *,
    uniform: bool,
    short: bool,
    bias: Tensor | None,
    sinks: Tensor | None,
) -> Kernel:
    """Returns the fastest kernel that can do the rule; benchmarks/attention.py compares them on a CPU.

    sdpa     without sinks or a window; on a GPU the only one in fp32
    varlen   on a GPU in half precision, with a window or segments of several lengths
    flash    as those two, and sinks, since it returns the lse
    flex     on a GPU in half precision, with a bias or a soft cap, for heads of 16 to 256 numbers; not where torch has
             to be deterministic and the bias learns, since its gradient is summed in any order
    fused    on a CPU in bf16 in a compiled block, over segments of one length, short ones or with a window, without a
             bias or a soft cap
    blocked  everything
    """
    if rule.softcap is not None or bias is not None:
        fits = device == "cuda" and dtype in (torch.float16, torch.bfloat16) and 16 <= head_dim <= 256
        any_order = bias is not None and bias.requires_grad
        return "flex" if fits and not (any_order and torch.are_deterministic_algorithms_enabled()) else "blocked"
    if device == "cpu":
        fast = short or rule.window is not None
        if uniform and fast and dtype == torch.bfloat16 and torch.compiler.is_compiling():
            return "fused"
        if rule.window is not None:
            return "blocked"
        return "sdpa" if uniform and sinks is None else "flash"
    if dtype in (torch.float32, torch.float64):
        return "sdpa" if rule.window is None and sinks is None else "blocked"
    if sinks is not None:
        return "flash"
    return "sdpa" if uniform and rule.window is None else "varlen"


def _sdpa(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: Batch, rule: Rule) -> Tensor:
    if batch.uniform:
        return _sdpa_equal(q_THK, k_TGK, v_TGK, len(batch.bounds) - 1, rule)
    spans = [slice(a, b) for a, b in pairwise(batch.bounds)]  # one call per segment beats a mask
    return torch.cat([_sdpa_equal(q_THK[s], k_TGK[s], v_TGK[s], 1, rule) for s in spans])


def _sdpa_equal(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, segments: int, rule: Rule) -> Tensor:
    """Computes attention over `segments` of equal length, as the batch dim of SDPA.

    The compiler knows their number, but not their length: it would take a batch dim that it derives from the length
    for a dim of the same size in another layout, and compute wrong gradients for other lengths.
    """
    q, k, v = (x.view(segments, -1, *x.shape[1:]).transpose(1, 2) for x in (q_THK, k_TGK, v_TGK))
    shared = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale, enable_gqa=shared)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: Batch, rule: Rule) -> Tensor:
    bounds, longest = batch.bounds_int32, batch.longest
    out = varlen_attn(
        *(q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest),
        scale=rule.scale,
        window_size=(-1 if rule.window is None else rule.window - 1, 0),
        **_GROUPED_QUERIES,
    )
    assert isinstance(out, Tensor)
    return out
