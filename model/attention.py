"""Grouped-query attention over the segments of a batch. batch.py has the shape legend."""

from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from triplane.model.batch import Batch
from triplane.model.config import ModelConfig
from triplane.model.documents import attend_documents
from triplane.model.rope import rotate

_GROUPED_QUERIES: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
"""torch 2.11 accepts fewer key and value heads than query heads without this option."""


class Attention(nn.Module):
    """Softmax attention in which n_heads / n_kv_heads query heads share a key and value head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=config.qkv_bias)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.core = SegmentAttention()

    def forward(self, x_TD: Tensor, rotations: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        # The projections set the number of heads, since they may hold a share of them.
        tokens = x_TD.shape[0]
        q_THK = rotate(self.wq(x_TD).view(tokens, -1, self.head_dim), *rotations)
        k_TGK = rotate(self.wk(x_TD).view(tokens, -1, self.head_dim), *rotations)
        v_TGK = self.wv(x_TD).view(tokens, -1, self.head_dim)
        return self.wo(self.core(q_THK, k_TGK, v_TGK, batch).reshape(tokens, -1))


class SegmentAttention(nn.Module):
    """`attend` as a module, so that another implementation can replace it."""

    def forward(self, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: Batch) -> Tensor:
        return attend(q_THK, k_TGK, v_TGK, batch)


def attend(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, batch: Batch) -> Tensor:
    """Computes causal attention within each segment, with a flash kernel on every device; (T, H, K)."""
    if batch.uniform:
        return _attend_equal(q_THK, k_TGK, v_TGK, batch.longest)
    if not q_THK.is_cuda:
        return attend_documents(q_THK, k_TGK, v_TGK, batch.bounds_int32, batch.longest)[0]
    if q_THK.dtype == torch.float32:  # no variable-length kernel takes fp32; one call per segment beats a mask
        spans = [slice(a, b) for a, b in pairwise(batch.bounds)]
        return torch.cat([_attend_equal(q_THK[s], k_TGK[s], v_TGK[s], s.stop - s.start) for s in spans])
    bounds, longest = batch.bounds_int32, batch.longest
    causal = (-1, 0)
    out = varlen_attn(q_THK, k_TGK, v_TGK, bounds, bounds, longest, longest, window_size=causal, **_GROUPED_QUERIES)
    assert isinstance(out, Tensor)
    return out


def _attend_equal(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, length: int) -> Tensor:
    """Computes attention over segments of equal length, as the batch dim of SDPA."""
    q, k, v = (x.view(-1, length, *x.shape[1:]).transpose(1, 2) for x in (q_THK, k_TGK, v_TGK))
    shared = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)
    return out.transpose(1, 2).flatten(0, 1)
