"""Linear layers that multiply in 8-bit floats, scaled by each tensor's largest magnitude at each use.

Activations and weights have more mantissa (e4m3), gradients more range (e5m2), as in Micikevicius et al. 2022.
The tensors are those of a rank: its tokens, its share of a weight (docs/parallelism.md compares that with scales over
all ranks). Products have the dtype of their inputs; weights are unchanged. Gradients accumulate in fp32; in forward
the GPU's tensor cores accumulate in fewer bits, which is twice as fast and loses no more than e4m3 already has.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triplane.model.modules import Multiplying, PartModule
from triplane.model.transformer import Transformer

_MULTIPLE = 16  # the GPU's kernel requires contracted and output dims to be multiples of it


def use_fp8(model: Transformer) -> None:
    """Swaps the products of linear layers in blocks, whatever share of a weight a rank holds."""
    for part in model.blocks.modules():
        if isinstance(part, PartModule):
            for weight in part.weights.values():
                if weight.in_fp8:
                    layer = part.get_submodule(weight.name.removesuffix(".weight"))
                    assert isinstance(layer, Multiplying), (weight, layer)
                    layer.product = product


def product(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Returns x @ weight.T + bias; widths, and for backward on a GPU the tokens, must be multiples of 16."""
    assert not any(width % _MULTIPLE for width in weight_FD.shape), weight_FD.shape
    out: Tensor = _Float8Product.apply(x_TD, weight_FD)  # type: ignore[no-untyped-call]
    return out if bias_F is None else out + bias_F


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
        x8_TD, x_scale = _quantized(x_TD, torch.float8_e4m3fn)
        weight8_FD, weight_scale = _quantized(weight_FD, torch.float8_e4m3fn)
        ctx.save_for_backward(x8_TD, x_scale, weight8_FD, weight_scale)
        ctx.weight_dtype = weight_FD.dtype
        return _product(x8_TD, x_scale, weight8_FD, weight_scale, x_TD.dtype, fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TF: Tensor) -> tuple[Tensor, Tensor]:
        x8_TD, x_scale, weight8_FD, weight_scale = ctx.saved_tensors
        grad8_TF, grad_scale = _quantized(grad_TF, torch.float8_e5m2)
        grad_x_TD = _product(grad8_TF, grad_scale, weight8_FD.T, weight_scale, grad_TF.dtype)
        grad_weight_FD = _product(grad8_TF.T, grad_scale, x8_TD.T, x_scale, ctx.weight_dtype)
        return grad_x_TD, grad_weight_FD


def _quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns x / scale in `dtype`, and the scale, which maps x's largest magnitude to the dtype's."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x / scale).to(dtype), scale


def _product(
    a_MK: Tensor, a_scale: Tensor, b_NK: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """Returns a @ b.T; the kernel requires K to be the contiguous dim of both."""
    a_MK, b_KN = a_MK.contiguous(), b_NK.contiguous().T
    return torch._scaled_mm(a_MK, b_KN, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
