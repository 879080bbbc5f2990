"""Expert parallelism: each of ep ranks holds a share of the experts, and gets the rows of all ranks that chose them.

The ranks are neighbours on the dp x cp axis. Rows travel by an all-to-all of uneven sizes, and their outputs back.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from triplane.model.dispatch import Dispatched, Slots, permuted
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


def _dispatched(x_SD: Tensor, slots: Slots, ep: Axis) -> Dispatched:
    """Sends rows to the ranks of their experts; they arrive in the order of this rank's experts."""
    assert ep.group is not None
    group = ep.group
    sent_E = slots.ends_E.diff(prepend=slots.ends_E.new_zeros(1))
    received_RE = collectives.all_to_all_single(sent_E, None, None, group)
    if x_SD.is_meta:  # without values all ranks send alike
        there = here = [len(x_SD) // ep.size] * ep.size
    else:  # the host must know how much to send, so it waits here for the device
        there, here = torch.stack((sent_E, received_RE)).view(2, ep.size, -1).sum(2).tolist()
    rows = sum(here)
    # To the compiler these are any numbers, until this says otherwise.
    torch._check(sum(there) == x_SD.shape[0])  # type: ignore[no-untyped-call]
    own = len(sent_E) // ep.size
    experts_S = torch.arange(own, device=x_SD.device).repeat(ep.size).repeat_interleave(received_RE, output_size=rows)
    local = Slots.of(experts_S[:, None], own)
    # The operator itself, since the library's function waits for it at once where the compiler traces it.
    on_their_way_SD = torch.ops._c10d_functional.all_to_all_single(x_SD.contiguous(), here, there, group.group_name)

    def arrived() -> Tensor:
        arrived_SD: Tensor = collectives.wait_tensor(on_their_way_SD)  # type: ignore[no-untyped-call]
        return permuted(arrived_SD, local.pair_S, local.row_S)

    def back(out_SD: Tensor) -> Tensor:
        by_rank_SD = permuted(out_SD, local.row_S, local.pair_S)
        return collectives.all_to_all_single(by_rank_SD, there, here, group)

    return Dispatched(arrived, local, back)
