"""Assigns layers and copies of weights to pipeline stages, and micro-batches to groups; imports no torch."""

from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from math import inf
from typing import Literal

from triplane.model.config import ModelConfig
from triplane.model.count import further_flops, head_flops, layer_flops
from triplane.model.describe import embedding_weights, head_weights, layer_weights
from triplane.storage.errors import LayoutError

_EMBEDDING = 0.1
"""The embedding's cost as a share of the head's: no product, but its gradient is as large a table."""

Cost = Callable[[int, int, int], float]
"""Maps a stage, its first layer and the one after its last to the cost."""

Copies = Literal["last", "every"]
"""Which later stages hold a copy of a weight of the first one."""


def copied_weights(config: ModelConfig) -> dict[str, Copies]:
    """Maps the names of the first stage's weights that later stages hold too to these stages.

    The last one scores with a tied table, and to predict further embeds as the first one does.
    """
    copied: dict[str, Copies] = {}
    for name in [weight.name for weight in embedding_weights(config)]:
        if name.startswith("positions.") and config.positions.every_stage:
            copied[name] = "every"
        elif config.predict_further is not None or (config.tie_embeddings and name == "embedding.weight"):
            copied[name] = "last"
    return copied


@cache
def stage_layers(config: ModelConfig, stages: int, seq_len: int) -> tuple[range, ...]:
    """Returns each stage's contiguous layers: the costliest stage as cheap as possible, the others as even.

    The first stage also has the embedding; the last also has the head and the modules that predict further, which embed
    once each, and may have no other layers.
    """
    n = config.n_layers
    if n < stages - 1:
        raise LayoutError(f"{stages} pipeline stages need at least {stages - 1} layers, but n_layers is {n}")
    pattern = [layer_flops(config, layer, seq_len) for layer in config.pattern]
    until = [0, *accumulate(pattern[number % len(pattern)] for number in range(n))]
    unit = until[-1] / n
    head = head_flops(config) / unit
    ending = head + further_flops(config, seq_len) / unit + (config.n_blocks - n) * _EMBEDDING * head

    def cost(stage: int, start: int, stop: int) -> float:
        """Returns the cost in units of a mean layer."""
        ends = (stage == 0) * _EMBEDDING * head + (stage == stages - 1) * ending
        return (until[stop] - until[start]) / unit + ends

    runs = {until[stop] - until[start]: (start, stop) for start in range(n + 1) for stop in range(start, n + 1)}
    limits = sorted({cost(stage, *run) for stage in (0, 1, stages - 1) for run in runs.values()})
    least = 0 if _same_roles(config) else 1
    limit = limits[bisect_left(limits, True, key=lambda limit: _divide(n, stages, cost, limit, least) is not None)]
    starts = _divide(n, stages, cost, limit, least)
    assert starts is not None
    return tuple(range(start, stop) for start, stop in pairwise([*starts, n]))


def _same_roles(config: ModelConfig) -> bool:
    """Returns True if a last stage without layers has weights of all roles that decay sets apart.

    ZeRO's ranks would otherwise wait for each other's groups of parameters.
    """
    if config.predict_further is not None:
        return True  # its layer is there
    in_layers = {weight.role for layer in config.pattern for weight in layer_weights(config, layer)}
    return "vector" not in in_layers or "vector" in {weight.role for weight in head_weights(config)}


def _divide(n: int, stages: int, cost: Cost, limit: float, least: int) -> tuple[int, ...] | None:
    """Returns each stage's first layer with the least sum of squared costs, none over `limit`; None if impossible.

    The last stage has `least` layers or more, the others one or more.
    """

    @cache
    def best(stage: int, start: int) -> tuple[float, tuple[int, ...]]:
        last = stage == stages - 1
        found: tuple[float, tuple[int, ...]] = (inf, ())
        if last and n - start < least:
            return found
        for stop in [n] if last else range(start + 1, n + 1):
            if cost(stage, start, stop) > limit:
                break
            rest, starts = (0.0, ()) if last else best(stage + 1, stop)
            found = min(found, (cost(stage, start, stop) ** 2 + rest, (start, *starts)))
        return found

    squares, starts = best(0, 0)
    return starts if squares < inf else None


def group_size(micro_batches: int, stages: int) -> int:
    """Returns how many micro-batches pass a stage before its rank turns to its next: the fewest the schedule allows.

    The last group must be whole, or hold at least as many as the pipeline has ranks.
    """
    assert micro_batches >= stages, f"the interleaved schedule needs {stages} micro-batches, not {micro_batches}"
    return next(n for n in range(stages, micro_batches + 1) if micro_batches % n == 0 or micro_batches % n >= stages)
