"""Activation checkpointing: backward recomputes a block's activations instead of keeping them from forward."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from triplane.model import attend, documents, grouped  # noqa: F401  they define operators in _KEPT

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.triplane.attend_documents.default,
    torch.ops.triplane.grouped_product.default,
    torch.ops.higher_order.flex_attention,
    torch.ops.higher_order.inductor_compiled_code,  # the same outside a compiled block
    torch.ops._c10d_functional.all_to_all_single.default,
}
"""Operators whose results `selective` keeps: products, attention, Ulysses' exchange; the rest is cheap to recompute."""


def apply_recompute(blocks: Iterable[nn.Module], how: Literal["selective", "full"]) -> None:
    """Wraps the forward pass of each block; module and parameter names stay.

    The compiler must see what `selective` keeps, so apply that before compiling; `full` wraps the compiled block.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        block.forward = _recomputed(block.forward, options)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Tensor], options: dict[str, Any]) -> Callable[..., Tensor]:
    # A function, since the compiler skips a partial of `checkpoint`.
    def recomputed(*args: Any) -> Tensor:
        return checkpoint(forward, *args, **options)

    return recomputed


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
