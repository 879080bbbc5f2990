"""Searches the layouts of a run on a number of GPUs: which fit, how fast, and why others do not."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from math import gcd
from typing import Any

from triplane.config.checks import check
from triplane.model.describe import expert_counts
from triplane.plan.estimate import Estimate, beyond_layout, estimate
from triplane.plan.gpus import RESERVED_GIB, Gpu
from triplane.training.config import RunConfig

_STAGES, _MOST_RANKS, _MOST_EXPERT_RANKS = (1, 2, 4, 8), 32, 64
_VARIANTS = tuple(product(("full", "selective", "none"), (False, True), (1, 2, 4, 8)))
"""Recomputation, whether to compile, and micro-batch sizes, that of the least memory first."""


@dataclass(frozen=True)
class Found:
    """A layout that fits."""

    config: RunConfig
    estimate: Estimate


@dataclass
class Refusal:
    """Layouts that do not fit for the same reason."""

    reason: str
    """The first layout's reason."""
    layouts: int = 0


@dataclass(frozen=True)
class Search:
    """The result of a search."""

    found: list[Found]
    """Fastest first."""
    refused: list[Refusal] = field(default_factory=list)
    """Most frequent first."""


def search(config: RunConfig, gpus: int, gpu: Gpu) -> Search:
    """Tries all axes that divide the GPUs, ZeRO stages, shards within a machine, recomputation modes, compiling and
    micro-batch sizes.

    Keeps other keys. Where the variant of the least memory is too large, the others are not tried.
    """
    found: list[Found] = []
    refused: dict[str, Refusal] = defaultdict(lambda: Refusal(""))
    other_problems = beyond_layout(config)
    for layout in _layouts(config, gpus, gpu):
        for number, variant in enumerate(_VARIANTS):
            candidate = _with(config, layout, *variant)
            answer = _try(candidate, gpus, gpu, ignored=other_problems)
            if isinstance(answer, Estimate) and answer.fits(gpu):
                found.append(Found(candidate, answer))
                continue
            hopeless = isinstance(answer, Estimate) and number == 0
            reason = answer if isinstance(answer, str) else _too_large(answer, gpu)
            refusal = refused[re.sub(r"\d[\d,.]*", "N", reason)]
            size = candidate.training.micro_batch_size
            refusal.reason = refusal.reason or f"{candidate.parallel.describe()}, micro-batches of {size}: {reason}"
            refusal.layouts += len(_VARIANTS) if hopeless else 1
            if hopeless:
                break
    found.sort(key=lambda layout: layout.estimate.speed.step_s)
    return Search(found, sorted(refused.values(), key=lambda refusal: -refusal.layouts))


def changes(config: RunConfig, other: RunConfig) -> list[str]:
    """Returns the overrides that turn `config` into `other`."""
    lines = []
    for table in ("parallel", "training"):
        theirs = getattr(other, table).model_dump()
        for key, value in getattr(config, table).model_dump().items():
            if theirs[key] != value and value != "auto":
                text = str(theirs[key])
                lines.append(f"{table}.{key}={text.lower() if text in ('True', 'False', 'None') else text}")
    return lines


def nearest(config: RunConfig, found: list[Found]) -> Found:
    """Returns the layout that changes the fewest keys, and of equal ones the fastest."""
    return min(found, key=lambda layout: (len(changes(config, layout.config)), layout.estimate.speed.step_s))


def _layouts(config: RunConfig, gpus: int, gpu: Gpu) -> Iterator[dict[str, Any]]:
    """Yields the keys of each division of the model and the batch."""
    layers, experts = config.model.n_layers, gcd(*expert_counts(config.model)) or 1
    divisors = [size for size in range(1, _MOST_RANKS + 1) if gpus % size == 0]
    axes: list[tuple[Any, ...]] = [
        tuple(tp for tp in divisors if tp <= gpu.gpus_per_node),
        tuple(pp for pp in divisors if pp <= layers),
        tuple(cp for cp in divisors if cp <= gpu.gpus_per_node and (cp == 1 or config.data.seq_len // cp >= 4096)),
        tuple(ep for ep in range(1, _MOST_EXPERT_RANKS + 1) if experts % ep == 0),
        _STAGES,
        (0, 1, 2, 3) if config.training.precision == "fp32" else (1, 2, 3),
        (False, True),
    ]
    for tp, pp, cp, ep, virtual, zero, hybrid in product(*axes):
        replicas, near = gpus // (tp * pp), gpu.gpus_per_node // tp
        if gpus % (tp * pp * cp) or replicas % ep or (pp == 1 and virtual > 1) or pp * virtual > layers:
            continue
        if hybrid and (zero == 0 or replicas <= near or replicas % near):
            continue
        yield {
            "tp": tp,
            "sequence_parallel": tp > 1,
            "pp": pp,
            "cp": cp,
            "ep": ep,
            "dp": gpus // (tp * pp * cp),
            "virtual_stages": virtual,
            "zero": zero,
            "dp_shard": near if hybrid else None,
        }


def _with(config: RunConfig, layout: dict[str, Any], recompute: str, compiled: bool, micro: int) -> RunConfig:
    keys = layout | {"recompute": recompute, "compile": compiled}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=keys),
            "training": config.training.model_copy(update={"micro_batch_size": micro}),
        }
    )


def _try(config: RunConfig, gpus: int, gpu: Gpu, *, ignored: set[str]) -> Estimate | str:
    """Returns the estimate of a layout, or why it is refused."""
    if problems := [problem for problem in check(config, gpus) if problem not in ignored]:
        return problems[0]
    return estimate(config, gpus, gpu)


def _too_large(answer: Estimate, gpu: Gpu) -> str:
    return f"needs {answer.peak_gib:,.1f} GiB of {gpu.memory_gib - RESERVED_GIB:,.1f}"
