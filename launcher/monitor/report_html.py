"""Renders the report of a run as one page of HTML, from the template beside this file."""

import math
import time
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader

from triplane.launcher.monitor.chart import Mark, chart
from triplane.launcher.monitor.run_status import RunStatus, ShownConfig
from triplane.training.metrics import METRICS
from triplane.training.run_log import Event, Metrics, Sample
from triplane.training.units import format_count, format_duration

Lines = Sequence[Metrics]
Events = Sequence[Event]
Samples = Sequence[Sample]

_CURVES = (
    ("Loss", "nats/token", {"loss": "training", "validation_loss": "validation"}),
    ("Bits per byte", "", {"bits_per_byte": "training", "validation_bits_per_byte": "validation"}),
    ("Gradient norm", "before clipping", {"gradient_norm": "gradient norm"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
    ("Throughput", "tokens/s", {"tokens_per_s": "all ranks"}),
    ("MFU", "fraction of the peak", {"mfu": "MFU"}),
    ("Step time", "s", {"step_time_s": "all", "data_time_s": "waiting for data"}),
    ("Memory", "GiB, peak of the fullest rank", {"memory_gib": "memory"}),
    ("Checkpoints", "s", {"checkpoint_time_s": "to write", "checkpoint_stall_time_s": "training stalled"}),
)
_BAD = ("failure", "rollback", "skip", "save failed", "checkpoint set aside")
_SAMPLES = 12
"""Number of the latest samples shown."""
_TILES = (
    ("loss", "loss", "{:.4f}".format),
    ("validation_loss", "validation loss", "{:.4f}".format),
    ("validation_bits_per_byte", "validation bits/byte", "{:.4f}".format),
    ("tokens_seen", "tokens", format_count),
    ("tokens_per_s", "tokens/s", format_count),
    ("mfu", "MFU", "{:.1%}".format),
    ("memory_gib", "GiB, fullest rank", "{:.1f}".format),
)
"""Metrics whose last value is shown, by name in `METRICS`."""
_TEMPLATE = "report.html.jinja"


def page(status: RunStatus, *, metrics: Lines, events: Events, samples: Samples, config: str) -> str:
    """Fills the template with the records of metrics.jsonl, history.jsonl and samples.jsonl, and the config's TOML."""
    marks = [Mark(event["step"], event["event"], event["event"] in _BAD) for event in events]
    marks = [mark for mark in marks if mark.bad or mark.text == "resume"]
    mixes, sources = _data(status.config)
    loader = PackageLoader(__package__, ".")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(_TEMPLATE)
    return template.render(
        run=str(status.run_dir),
        how=_how(status, events),
        written=time.strftime("%d %B %Y %H:%M UTC", time.gmtime()),
        tiles=_tiles(status, metrics),
        charts=_charts(metrics, marks),
        marked=bool(marks),
        events=[_shown(event) for event in events if event["event"] != "save"],
        saves=[event["step"] for event in events if event["event"] == "save"],
        mixes=mixes,
        sources=sources,
        samples=samples[-_SAMPLES:],
        config=config,
    )


def _how(status: RunStatus, events: Events) -> str:
    state = "done" if status.done else "not done"
    starts = [event["details"] for event in events if event["event"] in ("start", "resume")]
    if not starts:
        return state
    layout, ranks, precision = (starts[-1].get(key, "?") for key in ("layout", "ranks", "precision"))
    return f"{layout} on {ranks} {'rank' if ranks == 1 else 'ranks'}, {precision}; {state}"


def _tiles(status: RunStatus, metrics: Lines) -> list[tuple[str, str]]:
    """Returns labels and values."""
    shown = status.metrics
    return [
        (f"of {status.steps:,} steps", f"{status.step:,}"),
        *((label, form(shown[name])) for name, label, form in _TILES if name in shown),
        ("trained", format_duration(_trained_s(metrics))),
        ("resumes", str(status.restarts)),
    ]


def _trained_s(metrics: Lines) -> float:
    """Returns the seconds of training, without steps rolled back and without pauses."""
    total = before = 0.0
    for line in metrics:
        if "step_time_s" in line:
            total += line["step_time_s"] * (line["step"] - before)
            before = line["step"]
    return total


def _charts(metrics: Lines, marks: Sequence[Mark]) -> list[dict[str, object]]:
    charts: list[dict[str, object]] = []
    for title, unit, names in _CURVES:
        found = [(label, _points(metrics, name)) for name, label in names.items()]
        curves = [(label, points) for label, points in found if points]
        if curves:
            labels = [label for label, _ in curves] if len(names) > 1 else []
            svg = chart(curves, marks, format_count)
            charts.append({"title": title, "unit": unit, "labels": labels, "svg": svg})
    return charts


def _points(metrics: Lines, name: str) -> list[tuple[float, float]]:
    assert name in METRICS
    return [(line["step"], line[name]) for line in metrics if name in line and math.isfinite(line[name])]


def _shown(event: Event) -> dict[str, object]:
    return {
        "when": time.strftime("%d %b %H:%M:%S", time.gmtime(event["time"])),
        "step": f"{event['step']:,}",
        "name": event["event"],
        "bad": event["event"] in _BAD,
        "details": ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in event["details"].items()),
    }


def _data(config: ShownConfig) -> tuple[list[str], list[tuple[str, list[float]]]]:
    """Returns the names of the mixes, at the start and in each later phase, and each source's share in them."""
    mixes = [("share", [source.weight for source in config.data.sources])]
    mixes += [
        (f"from sequence {phase.from_sequence:,}", phase.weights) for phase in config.data.phases if phase.weights
    ]
    sources = [
        (source.corpus, [weights[i] / sum(weights) for _, weights in mixes if i < len(weights)])
        for i, source in enumerate(config.data.sources)
    ]
    return [name for name, _ in mixes], sources
