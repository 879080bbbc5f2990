"""Bounds the distance from fp32 that rounding alone gives a bf16 layout, at a stated probability of a false alarm.

A bf16 process differs from its fp32 twin by rounding. Over several seeds, the logarithms of the differences are about
normal, and a layout, which rounds in other places, is one more draw. So the bound is the upper prediction limit of a
normal sample (Student's t with n - 1 degrees of freedom, times sqrt(1 + 1/n)), at the probability of a false alarm
divided by the number of comparisons in the proof (Bonferroni).
"""

import math
from collections.abc import Sequence
from dataclasses import astuple
from statistics import NormalDist, mean, stdev

import torch

from triplane.model.config import ModelConfig
from triplane.parallel.config import ParallelConfig
from triplane.parallel.mesh import Mesh
from triplane.prove.reference import SEED, Difference, proof_engine, train_on_mesh, train_plainly, typical_difference

FALSE_ALARM = 1e-3
"""Probability that a proof rejects any bf16 layout for rounding alone."""
SEEDS = range(SEED, SEED + 16)


def differences_of_seeds(mesh: Mesh, model: ModelConfig, steps: range) -> list[Difference]:
    """Returns the distance of one bf16 process from fp32 over `steps`, for each of `SEEDS`."""
    found = []
    for seed in SEEDS:
        reference = train_plainly(model, steps.stop, seed)
        engine = proof_engine(mesh, model, ParallelConfig(dp=1), dtype=torch.bfloat16, seed=seed)
        trace = train_on_mesh(engine, range(steps.stop), seed)
        found.append(typical_difference(trace.after(steps.start), reference.after(steps.start), mesh.device))
    return found


def bound(found: Sequence[Difference], layouts: int) -> Difference:
    """Returns the bound that any of `layouts` exceeds by rounding alone with probability `FALSE_ALARM`."""
    kinds = list(zip(*map(astuple, found)))
    probability = FALSE_ALARM / (layouts * len(kinds))
    return Difference(*(_prediction_limit(values, probability) for values in kinds))


def _prediction_limit(values: Sequence[float], probability: float) -> float:
    """Returns the limit that one more draw from the log-normal distribution of `values` exceeds with `probability`."""
    logs = [math.log(value) for value in values]
    count = len(logs)
    return math.exp(mean(logs) + _student(count - 1, probability) * stdev(logs) * math.sqrt(1 + 1 / count))


def _student(freedom: int, probability: float) -> float:
    """Returns the upper quantile of Student's t, expanded around the normal one (Abramowitz and Stegun, 26.7.5)."""
    z = -NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))
