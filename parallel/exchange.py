"""Sums and gathers the shares of a buffer over ranks, by the fastest way of each backend."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from triplane.parallel.mesh import Axis

# torch 2.13 deprecates the older names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Wait = Callable[[], None]
"""Waits for a collective; on GPUs the device does, not the host."""


def own_share(buffer: Tensor, axis: Axis) -> Tensor:
    """Returns this rank's share of `buffer`."""
    share = len(buffer) // axis.size
    return buffer[axis.rank * share :][:share]


def sum_shares(buffer: Tensor, axis: Axis) -> Wait:
    """Starts to sum each rank's share of `buffer` over the axis, in place; other shares are undefined afterwards."""
    if axis.size == 1:
        return _nothing
    own = own_share(buffer, axis)
    if buffer.device.type != "cpu":
        return _wait(_reduce_scatter(own, buffer, group=axis.group, async_op=True))
    # gloo's reduce-scatter takes three times the CPU time, its all-reduce twice.
    received = torch.empty_like(buffer)
    arrive = _wait(dist.all_to_all_single(received, buffer, group=axis.group, async_op=True))

    def add() -> None:
        arrive()
        torch.sum(received.view(axis.size, -1), 0, out=own)

    return add


def sum_copies(share: Tensor, axis: Axis) -> Wait:
    """Starts to sum `share` over the axis, in place."""
    if axis.size == 1:
        return _nothing
    return _wait(dist.all_reduce(share, group=axis.group, async_op=True))


def gather_shares(buffer: Tensor, axis: Axis) -> Wait:
    """Starts to gather all ranks' shares of `buffer`, in place."""
    if axis.size == 1:
        return _nothing
    if buffer.device.type != "cpu":
        return _wait(_all_gather(buffer, own_share(buffer, axis), group=axis.group, async_op=True))
    # gloo's all-gather takes twice the CPU time.
    sent = [
        _wait(dist.broadcast(share, group=axis.group, group_src=rank, async_op=True))
        for rank, share in enumerate(buffer.chunk(axis.size))
    ]

    def arrive() -> None:
        for wait in sent:
            wait()

    return arrive


def _wait(work: dist.Work | None) -> Wait:
    assert work is not None, "this rank belongs to the group"

    def wait() -> None:
        work.wait()

    return wait


def _nothing() -> None:
    pass
