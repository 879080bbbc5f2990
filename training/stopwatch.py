"""Measures how long the phases of a step take."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Accumulates the seconds of named phases until they are taken.

    Kernel launches are asynchronous, so a phase is exact on a GPU only if `exact` makes it synchronize.
    """

    def __init__(self, device: torch.device):
        self.current = ""
        """The current phase, or "" between phases."""
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str, exact: bool = False) -> Iterator[None]:
        self.current = name
        start_s = time.perf_counter()
        yield
        if exact and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[name] += time.perf_counter() - start_s
        self.current = ""

    def take(self) -> dict[str, float]:
        """Returns the seconds of each phase since the last take."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
