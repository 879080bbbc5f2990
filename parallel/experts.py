"""Expert parallelism: each of ep ranks holds a share of the experts, and gets the rows of all ranks that chose them.

The ranks are neighbours on the dp x cp axis. Rows travel by an all-to-all of uneven sizes, and their outputs back.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from triplane.model.dispatch import Slots, permuted
from triplane.model.modules import PartModule, Stack
from triplane.model.transformer import Transformer
from triplane.parallel.mesh import Axis


def apply_expert_parallel(model: Transformer, ep: Axis) -> None:
    """Narrows the experts of `model` (on meta) to this rank's share."""
    for part in model.blocks.modules():
        stacks = [child for child in part.children() if isinstance(child, Stack)]
        for stack in stacks:
            for name, parameter in list(stack.named_parameters()):
                share = parameter.new_empty(len(parameter) // ep.size, *parameter.shape[1:])
                setattr(stack, name, nn.Parameter(share))
        if stacks:
            assert isinstance(part, PartModule)
            part.dispatched = partial(_dispatched, ep=ep)


def _dispatched(x_SD: Tensor, slots: Slots, ep: Axis) -> tuple[Tensor, Slots, Callable[[Tensor], Tensor]]:
    """Returns the rows of all ranks for this rank's experts in their order, and what takes their outputs back."""
    sent_E = slots.ends_E.diff(prepend=slots.ends_E.new_zeros(1))
    received_RE = torch.empty_like(sent_E)
    dist.all_to_all_single(received_RE, sent_E, group=ep.group)
    if x_SD.is_meta:  # without values all ranks send alike
        there = here = [len(x_SD) // ep.size] * ep.size
    else:  # the host must know how much to send, so it waits here for the device
        there, here = (counts.view(ep.size, -1).sum(1).tolist() for counts in (sent_E, received_RE))
    own = len(sent_E) // ep.size
    experts_S = (
        torch.arange(own, device=x_SD.device).repeat(ep.size).repeat_interleave(received_RE, output_size=sum(here))
    )
    local = Slots.of(experts_S[:, None], own)
    arrived_SD = _Exchange.apply(x_SD, there, here, ep)  # type: ignore[no-untyped-call]

    def back(out_SD: Tensor) -> Tensor:
        by_rank_SD = permuted(out_SD, local.row_S, local.pair_S)
        returned_SD: Tensor = _Exchange.apply(by_rank_SD, here, there, ep)  # type: ignore[no-untyped-call]
        return returned_SD

    return permuted(arrived_SD, local.pair_S, local.row_S), local, back


class _Exchange(torch.autograd.Function):
    """Sends runs of rows to each rank and receives theirs; gradients travel back."""

    @staticmethod
    def forward(ctx: Any, x_SD: Tensor, sent: list[int], received: list[int], ep: Axis) -> Tensor:
        ctx.back = received, sent, ep
        return _exchanged(x_SD, sent, received, ep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor | None, ...]:
        return _exchanged(grad_SD, *ctx.back), None, None, None


def _exchanged(x_SD: Tensor, sent: list[int], received: list[int], ep: Axis) -> Tensor:
    out_SD = x_SD.new_empty(sum(received), *x_SD.shape[1:])
    dist.all_to_all_single(out_SD, x_SD.contiguous(), received, sent, group=ep.group)
    return out_SD
