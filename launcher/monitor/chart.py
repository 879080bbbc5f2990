"""Draws a chart as inline SVG, for a page without scripts or network access."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from triplane.launcher.monitor.axis import Axis, linear, logarithmic, steps

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 400, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 376, 10, 176
_APART_X, _APART_Y = 50 / (_RIGHT - _LEFT), 18 / (_BOTTOM - _TOP)
"""Room for a label, as a share of a logarithmic axis."""
_BUCKETS = 150
"""Each bucket shows its lowest and highest point, so that no spike is lost."""
_SMOOTHED_FROM = 30
"""Points of a curve; the line through fewer shows each."""


@dataclass(frozen=True)
class Mark:
    """A step with an event."""

    step: int
    text: str
    bad: bool


@dataclass(frozen=True)
class Curve:
    """A line over the step."""

    name: str
    points: Points
    """With finite values."""
    style: str
    """CSS classes of colour and dashes."""
    smooth: bool = False
    """Whether the line is the mean around each point, over dots for the points themselves."""


@dataclass(frozen=True)
class Level:
    """A value to compare with, drawn across the chart."""

    name: str
    value: float
    style: str


def chart(
    curves: Sequence[Curve],
    *,
    last_step: int,
    marks: Sequence[Mark] = (),
    levels: Sequence[Level] = (),
    from_zero: bool = False,
    log: bool = False,
) -> str:
    """Draws curves, which have at least one point in all, on linear axes or, with `log`, on two logarithmic ones."""
    if log:
        curves = [Curve(c.name, [(x, y) for x, y in c.points if x > 0 and y > 0], c.style, c.smooth) for c in curves]
    ys = [y for curve in curves for _, y in curve.points] + [level.value for level in levels]
    if log:
        x_axis = logarithmic(1.0, max(2.0, last_step), apart=_APART_X, whole=True)
        y_axis = logarithmic(min(ys), max(ys), apart=_APART_Y)
    else:
        x_axis = steps(last_step)
        y_axis = linear(min([*ys, 0.0] if from_zero else ys), max(ys))
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">']
    for y, label in y_axis.ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {_y(y_axis, y)}H{_RIGHT}"/>')
        parts.append(f'<text class="y" x="{_LEFT - 6}" y="{_y(y_axis, y)}" dy=".35em" text-anchor="end">{label}</text>')
    for x, label in x_axis.ticks:
        parts.append(f'<text class="x" x="{_x(x_axis, x)}" y="{_BOTTOM + 18}" text-anchor="middle">{label}</text>')
    for mark in (mark for mark in marks if x_axis.low <= mark.step <= x_axis.high):
        style = "mark bad" if mark.bad else "mark"
        title = f"<title>step {mark.step:,}: {escape(mark.text)}</title>"
        parts.append(f'<path class="{style}" d="M{_x(x_axis, mark.step)} {_TOP}V{_BOTTOM}">{title}</path>')
    for level in levels:
        title = f"<title>{escape(level.name)}</title>"
        parts.append(f'<path class="{level.style}" d="M{_LEFT} {_y(y_axis, level.value)}H{_RIGHT}">{title}</path>')
    parts += [_drawn(curve, x_axis, y_axis) for curve in curves if curve.points]
    return "".join([*parts, "</svg>"])


def _x(axis: Axis, x: float) -> str:
    return f"{_LEFT + axis.at(x) * (_RIGHT - _LEFT):.1f}"


def _y(axis: Axis, y: float) -> str:
    return f"{_BOTTOM - axis.at(y) * (_BOTTOM - _TOP):.1f}"


def _drawn(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    title = f"<title>{escape(curve.name)}</title>"
    smooth = curve.smooth and len(curve.points) >= _SMOOTHED_FROM
    places = [(_x(x_axis, x), _y(y_axis, y)) for x, y in _thinned(curve.points)]
    parts = []
    if smooth or len(places) < _SMOOTHED_FROM:
        dots = "".join(f"M{x} {y}h0" for x, y in places)
        parts.append(f'<path class="dots {"faint " if smooth else ""}{curve.style}" d="{dots}">{title}</path>')
    if smooth:
        places = [(_x(x_axis, x), _y(y_axis, y)) for x, y in _thinned(smoothed(curve.points))]
    line = " ".join(f"{x},{y}" for x, y in places)
    return "".join([*parts, f'<polyline class="{curve.style}" points="{line}">{title}</polyline>'])


def smoothed(points: Points) -> Points:
    """Returns the mean around each point, over fewer at the start, where a curve falls fast, and at the end."""
    widest = len(points) // 30
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    means = []
    for i, (x, _) in enumerate(points):
        half = min(widest, i // 4)
        first, end = i - half, min(i + half + 1, len(points))
        means.append((x, (sums[end] - sums[first]) / (end - first)))
    return means


def _thinned(points: Points) -> Points:
    if len(points) <= 2 * _BUCKETS:
        return points
    size = math.ceil(len(points) / _BUCKETS)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda point: point[1]), max(bucket, key=lambda point: point[1])})
    return kept
