"""Assigns layers to pipeline stages and micro-batches to groups; imports no torch."""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from math import inf

from triplane.model.config import ModelConfig
from triplane.model.count import block_flops, head_flops
from triplane.storage.errors import LayoutError

_EMBEDDING = 0.1
"""The embedding's cost as a share of the head's: no product, but its gradient is as large a table."""


@cache
def stage_layers(config: ModelConfig, stages: int, seq_len: int) -> tuple[range, ...]:
    """Returns each stage's contiguous layers: the costliest stage as cheap as possible, the others as even.

    The first stage also has the embedding; the last also has the head, and may have no layers.
    """
    n = config.n_layers
    if n < stages - 1:
        raise LayoutError(f"{stages} pipeline stages need at least {stages - 1} layers, but n_layers is {n}")
    head = head_flops(config) / block_flops(config, seq_len)

    def cost(stage: int, layers: int) -> float:
        """Returns the cost in units of a layer."""
        return layers + (stage == 0) * _EMBEDDING * head + (stage == stages - 1) * head

    limits = sorted({cost(stage, layers) for stage in (0, 1, stages - 1) for layers in range(n + 1)})
    limit = limits[bisect_left(limits, True, key=lambda limit: _divide(n, stages, cost, limit) is not None)]
    numbers = _divide(n, stages, cost, limit)
    assert numbers is not None
    starts = [sum(numbers[:stage]) for stage in range(stages)]
    return tuple(range(start, start + number) for start, number in zip(starts, numbers))


def _divide(n: int, stages: int, cost: Callable[[int, int], float], limit: float) -> tuple[int, ...] | None:
    """Returns the layers of each stage with the least sum of squared costs, none over `limit`; None if impossible."""

    @cache
    def best(stage: int, left: int) -> tuple[float, tuple[int, ...]]:
        last = stage == stages - 1
        found: tuple[float, tuple[int, ...]] = (inf, ())
        for layers in [left] if last else range(1, left + 1):
            if cost(stage, layers) > limit:
                break
            rest, numbers = (0.0, ()) if last else best(stage + 1, left - layers)
            found = min(found, (cost(stage, layers) ** 2 + rest, (layers, *numbers)))
        return found

    squares, numbers = best(0, n)
    return numbers if squares < inf else None


def group_size(micro_batches: int, stages: int) -> int:
    """Returns how many micro-batches pass a stage before its rank turns to its next: the fewest the schedule allows.

    The last group must be whole, or hold at least as many as the pipeline has ranks.
    """
    assert micro_batches >= stages, f"the interleaved schedule needs {stages} micro-batches, not {micro_batches}"
    return next(n for n in range(stages, micro_batches + 1) if micro_batches % n == 0 or micro_batches % n >= stages)
