"""Blocks as compiled graphs: torch.compile fuses what stands between matrix products and attention."""

import shutil

import torch

from triplane.model.transformer import Transformer


def compile_blocks(model: Transformer) -> None:
    """Compiles each block in place, at its first call; names of modules and parameters stay.

    Blocks share their code, so one compilation serves all, and a second one any number of tokens.
    Call it after modules have been swapped.
    """
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def has_compiler() -> bool:
    """Whether the C++ compiler is here that torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
