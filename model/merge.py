"""Attention over two sets of keys, from attention and lse over each of them."""

import math

import torch
from torch import Tensor


def merge(out_THK: Tensor, lse_HT: Tensor, part_THK: Tensor, part_lse_HT: Tensor) -> None:
    """Merges attention over further keys into `out_THK` and `lse_HT`, in place; an lse of -inf means no keys."""
    weight_HT = torch.sigmoid(part_lse_HT - lse_HT).masked_fill(part_lse_HT == -math.inf, 0)
    out_THK.lerp_(part_THK.to(out_THK.dtype), weight_HT.T.unsqueeze(-1))
    lse_HT.copy_(torch.logaddexp(lse_HT, part_lse_HT))
