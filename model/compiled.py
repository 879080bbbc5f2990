"""Compiles blocks: torch.compile fuses the operations between matrix products and attention."""

import torch

from triplane.model.head import Head
from triplane.model.transformer import Transformer


def compile_blocks(model: Transformer) -> None:
    """Compiles each block and the loss in place, at their first call; module and parameter names stay.

    Blocks share their code, so one compilation serves all, and a second one serves any number of tokens.
    Call it after swapping modules.
    """
    torch._dynamo.config.capture_scalar_outputs = True  # numbers of rows, which experts on other ranks send
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    if type(model.head) is Head:  # that of tp has collectives in its loss
        model.head.compile_loss()


def separate_gradients(model: Transformer) -> None:
    """Gives the gradient of each vector in a compiled block memory of its own; call it once the weights have theirs.

    Two biases that are added to one stream have the same gradient. The compiler computes it once, and may return the
    sum over ranks as two tensors with the same memory, in which autograd would accumulate twice.
    """
    for parameter in model.blocks.parameters():
        if parameter.dim() == 1:
            parameter.register_hook(torch.clone)  # type: ignore[no-untyped-call]
