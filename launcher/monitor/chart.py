"""Draws a chart as inline SVG, for a page without scripts or network access."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 400, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 392, 10, 176
_BUCKETS = 300
"""Each bucket shows its lowest and highest point, so that no spike is lost."""


@dataclass(frozen=True)
class Mark:
    """A step with an event."""

    step: int
    text: str
    bad: bool


def chart(curves: Sequence[tuple[str, Points]], marks: Sequence[Mark], format_y: Callable[[float], str]) -> str:
    """Draws curves over the step, each a name and points with finite values; they need at least one point in all."""
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    y_ticks = _ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)

    def x_at(x: float) -> str:
        return f"{_LEFT + (x - x_low) / (x_high - x_low) * (_RIGHT - _LEFT):.1f}"

    def y_at(y: float) -> str:
        return f"{_BOTTOM - (y - y_low) / (y_high - y_low) * (_BOTTOM - _TOP):.1f}"

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y_at(y)}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y_at(y)}" dy="4" text-anchor="end">{escape(format_y(y))}</text>')
    for x in (x for x in _ticks(x_low, x_high) if x_low <= x <= x_high and x == round(x)):
        anchor = "end" if x == x_high else "middle"
        parts.append(f'<text x="{x_at(x)}" y="{_BOTTOM + 18}" text-anchor="{anchor}">{x:,.6g}</text>')
    for mark in (mark for mark in marks if x_low <= mark.step <= x_high):
        style = "mark bad" if mark.bad else "mark"
        title = f"<title>step {mark.step:,}: {escape(mark.text)}</title>"
        parts.append(f'<path class="{style}" d="M{x_at(mark.step)} {_TOP}V{_BOTTOM}">{title}</path>')
    for i, (name, points) in enumerate(curves):
        shown = _thinned(points)
        title = f"<title>{escape(name)}</title>"
        if len(shown) == 1:
            ((x, y),) = shown
            parts.append(f'<circle class="dot{i}" cx="{x_at(x)}" cy="{y_at(y)}" r="3">{title}</circle>')
        line = " ".join(f"{x_at(x)},{y_at(y)}" for x, y in shown)
        parts.append(f'<polyline class="line{i}" points="{line}">{title}</polyline>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Returns three to seven round values that span `low` to `high`; if these are equal, includes zero."""
    if low == high:
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)
    span = high - low
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= span / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _thinned(points: Points) -> Points:
    if len(points) <= 2 * _BUCKETS:
        return points
    size = math.ceil(len(points) / _BUCKETS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept
