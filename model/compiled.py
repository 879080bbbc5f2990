"""Blocks as compiled graphs: torch.compile fuses what stands between matrix products and attention."""

import shutil

import torch

from triplane.model.transformer import Block, Transformer


def compile_blocks(model: Transformer) -> None:
    """Compiles each block in place, at its first call; parameter names stay.

    Blocks share their code, so one compilation serves all, and a second one any number of tokens. Attention itself
    is left out: its kernels are fused already, and each set of documents' bounds would be another graph.
    Call it after modules have been swapped.
    """
    for block in model.blocks.values():
        assert isinstance(block, Block)
        core = block.attention.core
        core.forward = torch.compiler.disable(core.forward)  # type: ignore[method-assign, no-untyped-call]
        block.compile()


def has_compiler() -> bool:
    """Whether the C++ compiler is here that torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
