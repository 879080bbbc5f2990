"""Measures throughput, padding and step time between logs."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from triplane.model.count import flops_per_token
from triplane.parallel.engine import Engine
from triplane.training.hardware import peak_memory_gib
from triplane.training.stopwatch import Stopwatch


class Meter:
    """Counts tokens and steps since the last `restart`."""

    def __init__(
        self,
        engine: Engine,
        *,
        seq_len_at: Callable[[int], int],
        peak_flops_per_s: float | None,
        stopwatch: Stopwatch,
    ):
        self._config = engine.config
        self._mesh = engine.mesh
        self._seq_len_at = seq_len_at
        self._peak_flops_per_s = peak_flops_per_s
        self._stopwatch = stopwatch
        self.restart(position=0)

    def restart(self, *, position: int) -> None:
        """Resets the counts; the next step starts at sequence `position`."""
        self._steps = self._tokens = self._positions = 0
        self._seq_len = self._seq_len_at(position)
        self._stopwatch.take()

    def count(self, positions: int, tokens: int) -> None:
        """Adds a step of `positions`, of which `tokens` are not padding; over all ranks."""
        self._steps += 1
        self._positions += positions
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Returns the metrics since the last restart; collective."""
        seconds = self._stopwatch.take()
        device = self._mesh.device
        mine = [*(total / self._steps for total in seconds.values()), peak_memory_gib(device)]
        # A step is as slow as its slowest rank.
        slowest = torch.tensor(mine, dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        values = dict(zip([*seconds, "memory_gib"], slowest.tolist()))
        step_time_s = sum(values[name] for name in seconds)
        tokens_per_s_per_rank = self._tokens / self._steps / step_time_s / self._mesh.world_size
        return {
            "padding": 1 - self._tokens / self._positions,
            "tokens_per_s": tokens_per_s_per_rank * self._mesh.world_size,
            "tokens_per_s_per_rank": tokens_per_s_per_rank,
            **self._mfu(tokens_per_s_per_rank),
            "step_time_s": step_time_s,
            **values,
        }

    def _mfu(self, tokens_per_s_per_rank: float) -> dict[str, float]:
        if self._peak_flops_per_s is None:
            return {}
        flops_per_s = tokens_per_s_per_rank * flops_per_token(self._config, self._seq_len)
        return {"mfu": flops_per_s / self._peak_flops_per_s}
