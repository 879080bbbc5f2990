"""What every rank must know of a step alike, to decide alike."""

import math
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Verdict(NamedTuple):
    """On one step, the same on all ranks."""

    step: int
    position: int
    """The first sequence of its batch."""
    stop: int
    """The request to leave that some rank has had; 0 if none has."""
    loss: float
    """Infinite where it is no number."""
    gradient_norm: float


class Agreement:
    """One small all-reduce a step, read a step later: no GPU waits for its host."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pending: deque[tuple[int, int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, position: int, stop: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """Tells the others; collective."""
        scalars = (torch.full((), stop, device=self._device), loss, gradient_norm)
        values = torch.stack([scalar.to(self._device, torch.float64) for scalar in scalars])
        values.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=math.inf)  # a maximum may lose NaN
        dist.all_reduce(values, dist.ReduceOp.MAX)
        copied = None
        if self._device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending.append((step, position, values, copied))

    def take(self, everything: bool) -> list[Verdict]:
        """The verdicts not yet taken, oldest first; that of the last step only if `everything` is asked for, or if an
        earlier one has a request to leave."""
        verdicts = []
        while len(self._pending) > (0 if everything else 1):
            step, position, values, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()
            stop, loss, norm = values.tolist()
            verdicts.append(Verdict(step, position, int(stop), loss, norm))
            everything |= stop > 0
        return verdicts
