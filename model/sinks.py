"""Sinks: a logit for each query head that joins the softmax and has no value (gpt-oss).

They need no kernel. Given attention and lse over the keys, `join` returns those over keys and sink; with these, the
backward of any kernel computes the gradients of q, k and v, since it needs nothing else of the forward pass.
"""

import torch
from torch import Tensor


def join(out_THK: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Returns attention and lse with a share of the weight given to the sinks."""
    joined_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype).unsqueeze(1))
    kept_HT = (lse_HT - joined_HT).exp()
    return (out_THK * kept_HT.T.unsqueeze(-1)).to(out_THK.dtype), joined_HT


def gradient(grad_THK: Tensor, out_THK: Tensor, lse_HT: Tensor, sinks_H: Tensor) -> Tensor:
    """Returns the gradient of the sinks, given what `join` returned."""
    weight_HT = (sinks_H.to(lse_HT.dtype).unsqueeze(1) - lse_HT).exp()
    lean_TH = (grad_THK.to(lse_HT.dtype) * out_THK.to(lse_HT.dtype)).sum(-1)
    return -(weight_HT * lean_TH.T).sum(1).to(sinks_H.dtype)
