"""Attention over documents of any length as one operator, which the compiler does not trace.

Traced, each set of bounds would give another graph.
"""

from typing import Any

import torch
from torch import Tensor

from triplane.model import flash


@torch.library.custom_op("triplane::attend_documents", mutates_args=())
def attend_documents(
    q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, bounds_int32: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Computes causal attention (T, H, K) and its lse within each segment of `bounds_int32`, as in flash.py."""
    return flash.forward(q_THK, k_TGK, v_TGK, flash.Segments(bounds_int32, longest))


@attend_documents.register_fake
def _(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, bounds_int32: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_THK.dtype, torch.float32)
    return q_THK.new_empty(q_THK.shape), q_THK.new_empty((q_THK.shape[1], q_THK.shape[0]), dtype=wide)


@torch.library.custom_op("triplane::attend_documents_backward", mutates_args=())
def _backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    bounds_int32: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = flash.Segments(bounds_int32, longest)
    return flash.backward(grad_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, segments)


@_backward.register_fake
def _(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    out_THK: Tensor,
    lse_HT: Tensor,
    bounds_int32: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_THK, dk_TGK, dv_TGK = (x.new_empty(x.shape) for x in (q_THK, k_TGK, v_TGK))
    return dq_THK, dk_TGK, dv_TGK


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.longest = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, grad_THK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q_THK, k_TGK, v_TGK, bounds_int32, out_THK, lse_HT = ctx.saved_tensors
    grads = _backward(grad_THK, q_THK, k_TGK, v_TGK, out_THK, lse_HT, bounds_int32, ctx.longest)
    return *grads, None, None


attend_documents.register_autograd(_gradients, setup_context=_save)
