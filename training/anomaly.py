"""Losses and gradient norms that must not reach the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from triplane.training.config import FaultsConfig
from triplane.training.state import State
from triplane.training.verdicts import Verdict

_NORMAL = 1.4826
"""Standard deviation of a normal distribution per median absolute deviation."""
_LEAST = 0.01
"""Smallest deviation, as a share of the median, so that rounding is no spike."""


@dataclass(frozen=True)
class Anomaly:
    """A step with a bad loss or gradient norm."""

    step: int
    position: int
    """The first sequence of its batch."""
    what: str


def judge(state: State, verdicts: Sequence[Verdict], config: FaultsConfig) -> tuple[State, Anomaly | None]:
    """Returns the state with the losses of the steps before the first anomaly, and that anomaly, if any."""
    for verdict in verdicts:
        if what := anomaly_in(verdict, state.recent, config):
            return state, Anomaly(verdict.step, verdict.position, what)
        state = state.adding(verdict.loss, verdict.targets, verdict.text_bytes)
        if config.spike_z is not None:
            state = state.remembering(verdict.loss, verdict.gradient_norm, config.spike_window)
    return state, None


def anomaly_in(verdict: Verdict, recent: Sequence[tuple[float, float]], config: FaultsConfig) -> str | None:
    """Describes what is wrong with a step's loss or gradient norm, given those of earlier steps."""
    values = {"loss": verdict.loss, "gradient norm": verdict.gradient_norm}
    for name, value in values.items():
        if not math.isfinite(value):
            return f"{name} is not finite"
    if config.spike_z is None or len(recent) < config.spike_window:
        return None
    for (name, value), past in zip(values.items(), zip(*recent)):
        z = _deviations(value, past)
        if z > config.spike_z:
            return f"{name} {value:.4g} is {z:.1f} deviations above the median {median(past):.4g}"
    return None


def _deviations(value: float, past: Sequence[float]) -> float:
    """Returns how many deviations `value` is above the median of `past`; robust to outliers."""
    middle = median(past)
    deviation = _NORMAL * median(abs(other - middle) for other in past)
    return (value - middle) / max(deviation, _LEAST * abs(middle))
