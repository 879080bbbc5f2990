"""Computes the norm of gradients accurately at any size."""

from collections.abc import Iterable

import torch
from torch import Tensor

_RUN = 4096
"""Elements that are summed in fp32."""


def squared_norm(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Returns the sum of squares over `tensors`, on `device`; fp64 scalar.

    Sums rows in fp32, long ones in runs, and their results in fp64: torch's fp32 norm of a whole tensor on a CPU is
    1e-3 too small at 20 M elements and 1.3e-2 at 120 M, and an fp64 copy of all gradients takes twice their memory.
    """
    rows = [torch.linalg.vector_norm(run, dim=-1).flatten() for tensor in tensors for run in _runs(tensor)]
    return torch.cat([torch.zeros(1, device=device), *rows]).double().square().sum()


def _runs(tensor: Tensor) -> tuple[Tensor, ...]:
    """Returns views whose last dims hold at most `_RUN` elements."""
    if tensor.shape[-1] <= _RUN:
        return (tensor,)
    whole = tensor.shape[-1] // _RUN * _RUN
    return tensor[..., :whole].view(*tensor.shape[:-1], whole // _RUN, _RUN), tensor[..., whole:]
