"""Flash attention that also returns the log-sum-exp of each query's scores, needed to merge partial results.

Shapes are those of model/batch.py, with S keys; lse is (H, T), fp32 or wider. There is no fp32 kernel on a GPU.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from triplane.model.rule import Rule

_aten = torch.ops.aten


class Segments(NamedTuple):
    """Runs of tokens that attend causally within themselves, as in a Batch; some may be empty."""

    bounds_int32: Tensor
    longest: int
    """At least the length of the longest segment."""


def forward(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, segments: Segments | None, rule: Rule
) -> tuple[Tensor, Tensor]:
    """Returns attention (T, H, K) and its lse; without `segments` each query sees each key.

    Only a GPU's kernel has windows, and neither has soft caps.
    """
    assert rule.softcap is None, rule
    if q_THK.is_cuda:
        assert q_THK.dtype != torch.float32, "no flash kernel on a GPU takes fp32"
        lengths = _lengths(q_THK, k_SGK, segments)
        out_THK, lse_HT, *_ = _aten._flash_attention_forward(
            *(q_THK, k_SGK, v_SGK, *lengths, 0.0, segments is not None, False), **_options(rule, segments)
        )
        return out_THK, lse_HT
    assert rule.window is None, rule
    parts = [
        _aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x[span]) for x in (q_THK, k_SGK, v_SGK)), 0.0, segments is not None, scale=rule.scale
        )
        for span in _spans(segments)
    ]
    return torch.cat([_tokens_first(out) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=1)


def backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_SGK: Tensor,
    v_SGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    segments: Segments | None,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v; with a merged `out` and `lse`, the part due to these keys and values."""
    if q_THK.is_cuda:
        lengths = _lengths(q_THK, k_SGK, segments)
        # The kernel requires a generator state, even without dropout.
        seed, offset = q_THK.new_zeros(2, dtype=torch.uint64), q_THK.new_empty(0)
        return _aten._flash_attention_backward(
            *(grad_THK, q_THK, k_SGK, v_SGK, out_THK, lse_HT.contiguous()),
            *(*lengths, 0.0, segments is not None, seed, offset),
            **_options(rule, segments),
        )
    parts = [
        _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_heads_first(x[span]) for x in (grad_THK, q_THK, k_SGK, v_SGK, out_THK)),
            *(lse_HT[None, :, span], 0.0, segments is not None),
            scale=rule.scale,
        )
        for span in _spans(segments)
    ]
    dq_THK, dk_SGK, dv_SGK = (torch.cat([_tokens_first(x) for x in grads]) for grads in zip(*parts))
    return dq_THK, dk_SGK, dv_SGK


def _options(rule: Rule, segments: Segments | None) -> dict[str, float | int]:
    """Returns the GPU kernels' scale and window, which counts the keys before a query's own."""
    if rule.window is None:
        return {"scale": rule.scale}
    assert segments is not None, "a window needs causal segments"
    return {"scale": rule.scale, "window_size_left": rule.window - 1, "window_size_right": 0}


def _spans(segments: Segments | None) -> list[slice]:
    if segments is None:
        return [slice(None)]
    return [slice(a, b) for a, b in pairwise(segments.bounds_int32.tolist()) if a < b]


def _heads_first(x_THK: Tensor) -> Tensor:
    return x_THK.transpose(0, 1).unsqueeze(0)


def _tokens_first(x_1HTK: Tensor) -> Tensor:
    return x_1HTK.squeeze(0).transpose(0, 1)


def _lengths(q_THK: Tensor, k_SGK: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor, int, int]:
    """Returns the bounds of the queries' and the keys' segments, and the longest of each."""
    if segments is not None:
        return segments.bounds_int32, segments.bounds_int32, segments.longest, segments.longest
    queries, keys = len(q_THK), len(k_SGK)
    # Built on the device, since a copy from the host would wait for it.
    one_q, one_k = (torch.arange(0, n + 1, n, dtype=torch.int32, device=q_THK.device) for n in (queries, keys))
    return one_q, one_k, queries, keys
