"""Products of rows with the matrix of the group that each belongs to, as one operator.

The compiler does not trace it, since torch's own kernel has no shapes to trace but for bf16.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes of which torch's kernel requires rows to be a multiple."""


@torch.library.custom_op("triplane::grouped_product", mutates_args=())
def grouped_product(x_SD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Multiplies the rows from `ends_E[e - 1]` to `ends_E[e]` by the transpose of matrix e."""
    if _fits(x_SD, weight_EFD):
        return torch._grouped_mm(x_SD, weight_EFD.transpose(1, 2), offs=ends_E)
    out_SF = x_SD.new_empty(x_SD.shape[0], weight_EFD.shape[1])
    for rows, weight_FD in zip(_groups(ends_E), weight_EFD, strict=True):
        out_SF[rows] = x_SD[rows] @ weight_FD.T
    return out_SF


@grouped_product.register_fake
def _(x_SD: Tensor, weight_EFD: Tensor, _: Tensor) -> Tensor:
    return x_SD.new_empty(x_SD.shape[0], weight_EFD.shape[1])  # `len` would ask for a number


@torch.library.custom_op("triplane::grouped_product_backward", mutates_args=())
def _backward(grad_SF: Tensor, x_SD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of the rows and of the matrices."""
    grad_SF = grad_SF.contiguous()
    if _fits(x_SD, weight_EFD):
        dx_SD = torch._grouped_mm(grad_SF, weight_EFD, offs=ends_E)
        return dx_SD, torch._grouped_mm(grad_SF.T, x_SD, offs=ends_E)
    dx_SD, dweight_EFD = torch.empty_like(x_SD), torch.empty_like(weight_EFD)
    for number, rows in enumerate(_groups(ends_E)):
        dx_SD[rows] = grad_SF[rows] @ weight_EFD[number]
        dweight_EFD[number] = grad_SF[rows].T @ x_SD[rows]
    return dx_SD, dweight_EFD


@_backward.register_fake
def _(_: Tensor, x_SD: Tensor, weight_EFD: Tensor, __: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_SD), torch.empty_like(weight_EFD)


def _fits(x_SD: Tensor, weight_EFD: Tensor) -> bool:
    """Returns whether torch's kernel takes these; the loop that does the rest waits for the device."""
    widths = weight_EFD.shape[1:]
    aligned = not any(width * x_SD.element_size() % _ALIGNMENT for width in widths)
    kernel = x_SD.dtype == torch.bfloat16 or (x_SD.dtype == torch.float32 and not x_SD.is_cuda)
    return kernel and aligned and len(x_SD) > 0


def _groups(ends_E: Tensor) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise([0, *ends_E.tolist()]))


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_SF: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_SF, *ctx.saved_tensors), None


grouped_product.register_autograd(_gradients, setup_context=_save)
