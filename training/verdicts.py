"""Per-step facts that all ranks agree on."""

import math
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from triplane.parallel.engine import StepLoss


class Verdict(NamedTuple):
    """Facts about one step, the same on all ranks."""

    step: int
    position: int
    """The first sequence of its batch."""
    stop: int
    """The request to stop that some rank received; 0 if none did."""
    loss: float
    """Infinite instead of NaN."""
    targets: int
    text_bytes: float
    """Bytes of text that the targets spell."""
    gradient_norm: float


class Agreement:
    """One small all-reduce per step, read a step later so that no GPU waits for its host."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pending: deque[tuple[int, int, float, Tensor, torch.cuda.Event | None]] = deque()

    def put(
        self, *, step: int, position: int, stop: int, loss: StepLoss, bytes_per_target: float, gradient_norm: Tensor
    ) -> None:
        """Shares the facts of a step with the other ranks; collective."""
        scalars = (torch.full((), stop, device=self._device), loss.cross_entropy, loss.tokens, gradient_norm)
        values = torch.stack([scalar.to(self._device, torch.float64) for scalar in scalars])
        values.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=math.inf)  # a maximum may lose NaN
        dist.all_reduce(values, dist.ReduceOp.MAX)
        copied = None
        if self._device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._pending.append((step, position, bytes_per_target, values, copied))

    def take(self, everything: bool) -> list[Verdict]:
        """Returns the verdicts not yet taken, oldest first; includes the last step only with `everything`, or after an
        earlier one with a request to stop."""
        verdicts = []
        while len(self._pending) > (0 if everything else 1):
            step, position, bytes_per_target, values, copied = self._pending.popleft()
            if copied is not None:
                copied.synchronize()
            stop, loss, targets, norm = values.tolist()
            verdicts.append(
                Verdict(
                    step=step,
                    position=position,
                    stop=int(stop),
                    loss=loss,
                    targets=int(targets),
                    text_bytes=targets * bytes_per_target,
                    gradient_norm=norm,
                )
            )
            everything |= stop > 0
        return verdicts
