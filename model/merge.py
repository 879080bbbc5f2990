"""Attention over two sets of keys, from attention and lse over each of them."""

import math

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merges attention over further keys into `out` (..., K) and `lse` (...), in place; an lse of -inf: no keys."""
    weight = torch.sigmoid(part_lse - lse).masked_fill_(part_lse == -math.inf, 0)
    out.lerp_(part.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(torch.logaddexp(lse, part_lse))
