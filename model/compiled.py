"""Compiles blocks: torch.compile fuses the operations between matrix products and attention."""

import shutil

import torch

from triplane.model.transformer import Transformer


def compile_blocks(model: Transformer) -> None:
    """Compiles each block in place, at its first call; module and parameter names stay.

    Blocks share their code, so one compilation serves all, and a second one serves any number of tokens.
    Call it after swapping modules.
    """
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def has_compiler() -> bool:
    """Returns True if there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
