"""Axes of charts: which values are marked, and how they are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_INTERVALS = 5
"""Most intervals between ticks."""
_PREFIXES = {3: " k", 6: " M", 9: " G", 12: " T"}
_PLAIN = 10_000
"""Values below it are written without a prefix."""


@dataclass(frozen=True)
class Axis:
    """The values from `low` to `high`, and the ticks among them, each a value and its label."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """Returns where `value` lies, 0 at `low` and 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear(low: float, high: float, *, whole: bool = False) -> Axis:
    """Returns an axis that spans `low` to `high` and ends at ticks; at whole numbers if `whole`."""
    if low == high:
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)
    step = _step(high - low)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [i * step for i in range(first, last + 1)]
    return Axis(min(low, values[0]), max(high, values[-1]), _labelled(values, step))


def steps(last: float) -> Axis:
    """Returns the axis of the steps from 0, which ends at `last`."""
    axis = linear(0.0, max(1.0, last), whole=True)
    return Axis(0.0, max(1.0, last), [(value, f"{value:,.0f}") for value, _ in axis.ticks if value <= max(1.0, last)])


def logarithmic(low: float, high: float, *, apart: float, whole: bool = False) -> Axis:
    """Returns a logarithmic axis from `low` to `high`, whose ticks are `apart`, a share of its length, or more."""
    if low == high:
        low, high = low / 2, high * 2
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices = [[10.0**k for k in decades], [m * 10.0**k for k in decades for m in (1, 2, 5)]]
    within = [[value for value in values if low <= value <= high] for values in choices]
    values = next((found for found in within if len(found) > 2), None)
    step = None
    if values is None:
        step = _step(high - low)
        values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    axis = Axis(low, high, [], log=True)
    kept: list[float] = []
    for value in values:
        if (not whole or value == round(value)) and (not kept or axis.at(value) - axis.at(kept[-1]) >= apart):
            kept.append(value)
    labelled = _labelled(kept, step) if step and kept else [(value, f"{value:,.10g}") for value in kept]
    return Axis(low, high, labelled, log=True)


def _step(span: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, of which `span` has at most so many."""
    size = 10 ** math.floor(math.log10(span / _INTERVALS))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= span / _INTERVALS * (1 - 1e-9))


def _labelled(values: Sequence[float], step: float) -> list[tuple[float, str]]:
    """Writes all with the same power of ten, and as many decimals as tell them apart."""
    top = max(map(abs, values))
    power, suffix = 0, ""
    if top >= _PLAIN:
        power = min(max(_PREFIXES), math.floor(math.log10(top)) // 3 * 3)
        suffix = _PREFIXES[power]
    elif top < 1e-3:
        power = math.floor(math.log10(top))
        suffix = f"e{power}"
    decimals = max(0, power - math.floor(math.log10(step) + 1e-9))
    return [(value, f"{value / 10.0**power:,.{decimals}f}{suffix}" if value else "0") for value in values]
