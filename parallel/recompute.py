"""Activation checkpointing: what backward computes again instead of keeping it from forward, block by block."""

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from triplane.model.transformer import Transformer

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._flash_attention_forward.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}
"""What `selective` keeps: products, attention, and Ulysses' exchange; the rest is cheap to do again."""


def apply_recompute(model: Transformer, how: Literal["none", "selective", "full"]) -> None:
    """Wraps each block. The names of modules and parameters stay."""
    if how == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in model.blocks.values():
        block.forward = partial(checkpoint, block.forward, **options)  # type: ignore[method-assign]


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
