"""Attention over documents of any length as one operator, which the compiler does not trace.

Traced, each set of bounds would give another graph.
"""

from typing import Any

import torch
from torch import Tensor

from triplane.model import blocked, flash, fused, sinks
from triplane.model.rule import Rule
from triplane.model.tiles import Span, spans_within


@torch.library.custom_op("triplane::attend_documents", mutates_args=())
def attend_documents(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    bias_HL: Tensor | None,
    sinks_H: Tensor | None,
    bounds_int32: Tensor,
    longest: int,
    kernel: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Computes attention (T, H, K) and its lse within each segment of `bounds_int32`, by a kernel of attend.py."""
    rule = Rule(scale, window, softcap)
    if kernel == "flash":
        out_THK, lse_HT = flash.forward(q_THK, k_TGK, v_TGK, flash.Segments(bounds_int32, longest), rule)
    elif kernel == "fused":
        out_THK, lse_HT = fused.forward(q_THK, k_TGK, v_TGK, _spans(bounds_int32, longest, len(q_THK)), rule)
    else:
        spans = _spans(bounds_int32, longest, len(q_THK))
        out_THK, lse_HT = blocked.forward(q_THK, k_TGK, v_TGK, spans, rule, bias_HL)
    if sinks_H is not None:
        out_THK, lse_HT = sinks.join(out_THK, lse_HT, sinks_H)
    return out_THK.to(q_THK.dtype), lse_HT


@attend_documents.register_fake
def _(q_THK: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty((q_THK.shape[1], q_THK.shape[0]), dtype=wide)


@torch.library.custom_op("triplane::attend_documents_backward", mutates_args=())
def _backward(
    grad_THK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    bias_HL: Tensor | None,
    sinks_H: Tensor | None,
    bounds_int32: Tensor,
    longest: int,
    kernel: str,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """Returns the gradients of q, k and v, and of the bias and the sinks where there are any."""
    rule = Rule(scale, window, softcap)
    known = (grad_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT)
    if kernel == "flash":
        grads = [*flash.backward(*known, flash.Segments(bounds_int32, longest), rule)]
    elif kernel == "fused":
        grads = [x.to(q_THK.dtype) for x in fused.backward(*known, _spans(bounds_int32, longest, len(q_THK)), rule)]
    else:
        *qkv, dbias_HL = blocked.backward(*known, _spans(bounds_int32, longest, len(q_THK)), rule, bias_HL)
        grads = [x.to(q_THK.dtype) for x in qkv] + ([] if dbias_HL is None else [dbias_HL])
    return grads if sinks_H is None else [*grads, sinks.gradient(grad_THK, out_THK, lse_HT, sinks_H)]


@_backward.register_fake
def _(
    grad_THK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    bias_HL: Tensor | None,
    sinks_H: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK, bias_HL, sinks_H) if x is not None]


def _spans(bounds_int32: Tensor, longest: int, tokens: int) -> list[Span]:
    if longest * (len(bounds_int32) - 1) == tokens:  # nothing to ask a GPU for
        return spans_within(range(0, tokens + 1, longest))
    return spans_within(bounds_int32.tolist())


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest, ctx.kernel, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx: Any, grad_THK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    rule = (ctx.longest, ctx.kernel, ctx.scale, ctx.window, ctx.softcap)
    saved = ctx.saved_tensors  # read once: recomputation frees what it has unpacked
    grads = iter(_backward(grad_THK, *saved, *rule))
    bias_HL, sinks_H = saved[5:7]
    dq_THK, dk_TGK, dv_TGK = (next(grads) for _ in range(3))
    dbias_HL, dsinks_H = (None if x is None else next(grads) for x in (bias_HL, sinks_H))
    return dq_THK, dk_TGK, dv_TGK, dbias_HL, dsinks_H, *[None] * 6


attend_documents.register_autograd(_gradients, setup_context=_save)
