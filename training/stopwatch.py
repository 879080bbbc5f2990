"""Where the time of a step goes."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the seconds of named phases until they are taken.

    A GPU works on after the call that gave it the work has returned, so phases are exact only where
    `exact` makes them wait for it.
    """

    def __init__(self, device: torch.device):
        self.current = ""
        """The phase that is under way."""
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
        """The seconds of each phase since the last take."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
