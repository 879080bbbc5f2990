"""The charts of a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from triplane.launcher.monitor.chart import Curve, Level, Mark, chart
from triplane.launcher.monitor.facts_table import baselines
from triplane.launcher.monitor.recorded import FAULTS, Recorded
from triplane.training.callbacks import USERS

COLOURS = 8
"""Colours of the style sheet; with more runs they come again, dashed."""
_SAME = 1.01
"""Ratio up to which bytes a token are those of one tokenizer."""


@dataclass(frozen=True)
class _Chart:
    title: str
    unit: str
    curves: dict[str, str]
    """Metrics and their labels."""
    smooth: bool = True
    from_zero: bool = True
    log: bool = False
    """Whether it can also be shown on logarithmic axes."""


_LOSS = _Chart(
    "Loss",
    "nats/token",
    {"loss": "training", "validation_loss": "validation", "validation_average_loss": "of the average"},
    from_zero=False,
    log=True,
)
_ONE = (
    _LOSS,
    _Chart("Gradient norm", "before clipping", {"gradient_norm": "gradient norm"}, log=True),
    _Chart("Learning rate", "", {"learning_rate": "learning rate"}, smooth=False),
    _Chart("Gradient noise scale", "tokens", {"noise_scale": "noise scale"}, smooth=False, log=True),
    _Chart("Throughput", "tokens/s", {"tokens_per_s": "all ranks"}),
    _Chart("Busiest expert", "over the mean load", {"expert_load": "load"}),
    _Chart("Memory", "GiB, peak of the rank with most", {"memory_gib": "memory"}, smooth=False),
    _Chart(
        "Checkpoints",
        "seconds",
        {"checkpoint_time_s": "to write", "checkpoint_stall_time_s": "stall"},
        smooth=False,
    ),
)
_SEVERAL = (
    _Chart("Loss", "nats/token, training", {"loss": ""}, from_zero=False, log=True),
    _Chart("Validation loss", "nats/token", {"validation_loss": ""}, from_zero=False, log=True),
    _Chart("Bits per byte", "validation", {"validation_bits_per_byte": ""}, from_zero=False, log=True),
    *_ONE[1:7],
)


def charts(runs: Sequence[Recorded]) -> list[dict[str, Any]]:
    """Returns title, unit, keys and drawings of each chart; of several runs, each has a line in its colour."""
    alone = len(runs) == 1
    marks = [Mark(event["step"], event["event"], event["event"] in FAULTS) for event in runs[0].events]
    marks = [mark for mark in marks if mark.bad or mark.text == "resume"] if alone else []
    last_step = max((int(line["step"]) for run in runs for line in run.metrics), default=0)
    drawn = []
    for kind in (*(_ONE if alone else _SEVERAL), *_users(runs)):
        if kind.title == "Bits per byte" and _one_tokenizer(runs):
            continue  # the curves of the loss in another unit
        levels = _levels(runs) if "loss" in kind.curves else []
        curves = [curve for curve in _curves(runs, kind) if curve.points]
        if not curves:
            continue
        can_log = kind.log and any(x > 0 and y > 0 for curve in curves for x, y in curve.points)
        draw = partial(chart, curves, last_step=last_step, marks=marks, levels=levels, from_zero=kind.from_zero)
        keys = [(curve.style, curve.name) for curve in curves] if alone and len(kind.curves) > 1 else []
        drawn.append(
            {
                "title": kind.title,
                "unit": kind.unit,
                "keys": keys + [(level.style, level.name) for level in levels],
                "linear": draw(),
                "log": draw(log=True) if can_log else "",
            }
        )
    return drawn


def _users(runs: Sequence[Recorded]) -> list[_Chart]:
    """Returns a chart for each metric of the user's callbacks."""
    names = sorted({name for run in runs for line in run.metrics for name in line if name.startswith(USERS)})
    return [_Chart(name.removeprefix(USERS), "by a callback", {name: ""}, from_zero=False) for name in names]


def _curves(runs: Sequence[Recorded], kind: _Chart) -> list[Curve]:
    if len(runs) == 1:
        named = [(name, label, f"line{i}") for i, (name, label) in enumerate(kind.curves.items())]
        return [
            Curve(label, runs[0].points(name), style, smooth=kind.smooth and not name.startswith("validation"))
            for name, label, style in named
        ]
    (name,) = kind.curves
    return [Curve(run.name, run.points(name), style(i), smooth=kind.smooth) for i, run in enumerate(runs)]


def style(number: int) -> str:
    """Returns the classes of the run with this number."""
    return f"line{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def _levels(runs: Sequence[Recorded]) -> list[Level]:
    """Returns the baselines that all runs share."""
    first, *others = [baselines(run) for run in runs]
    return [
        Level(f"{name} = {value:.2f}", value, f"level{i}")
        for i, (name, value) in enumerate(first.items())
        if all(other.get(name) == value for other in others)
    ]


def _one_tokenizer(runs: Sequence[Recorded]) -> bool:
    """Returns whether the losses of the runs, in nats a token, compare."""
    pairs = [(run.last("validation_loss"), run.last("validation_bits_per_byte")) for run in runs]
    ratios = [nats / bits for nats, bits in pairs if nats and bits]
    return not ratios or max(ratios) <= _SAME * min(ratios)
