"""The report of a run as one page of HTML that holds all it shows."""

import math
import time
from collections.abc import Iterable, Sequence
from html import escape

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
    ("Gradient norm", "before clipping", {"gradient_norm": "gradient norm"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
    ("Throughput", "tokens/s", {"tokens_per_s": "all ranks"}),
    ("MFU", "fraction of the peak", {"mfu": "MFU"}),
    ("Step time", "s", {"step_time_s": "all", "data_time_s": "waiting for data"}),
    ("Memory", "GiB, peak of the fullest rank", {"memory_gib": "memory"}),
    ("Checkpoints", "s", {"checkpoint_time_s": "to write", "checkpoint_stall_time_s": "training stood still"}),
)
_BAD = ("failure", "rollback", "skip", "save failed", "checkpoint set aside")
_SAMPLES = 12
"""The last so many."""
_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1c1d1f; --soft: #63666b; --rule: #e3e3df;
  --line0: #2563c9; --line1: #d2690e; --bad: #c62f2f }
@media (prefers-color-scheme: dark) { :root { --page: #131416; --card: #1c1e21; --ink: #e9e9e7; --soft: #9a9da3;
  --rule: #313439; --line0: #6ea2ff; --line1: #f39a4a; --bad: #ff7272 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 24px 16px 64px; max-width: 1280px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 24px; overflow-wrap: anywhere }
h2 { margin: 32px 0 8px; font-size: 17px }
p { margin: 4px 0 }
.soft, th { color: var(--soft) }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)) }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); margin-top: 16px }
.stack { display: grid; gap: 12px }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px; min-width: 0 }
.tiles b { display: block; font-size: 20px; font-weight: 600; white-space: nowrap }
.tiles span { color: var(--soft); font-size: 13px }
.card h3 { margin: 0; font-size: 15px }
.key { font-size: 13px; font-weight: 400; color: var(--soft) }
.key span { margin-left: 10px; white-space: nowrap }
.key i { display: inline-block; width: 12px; height: 3px; margin: 0 5px 3px 0; border-radius: 2px }
svg { display: block; width: 100%; margin-top: 4px }
svg text { fill: var(--soft); font-size: 11px }
svg .grid { stroke: var(--rule) }
svg polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.line0 { stroke: var(--line0) } .line1 { stroke: var(--line1) }
.dot0 { fill: var(--line0) } .dot1 { fill: var(--line1) }
.key .line0 { background: var(--line0) } .key .line1 { background: var(--line1) }
svg .mark { stroke: var(--soft); stroke-dasharray: 3 3; fill: none }
svg .bad { stroke: var(--bad) }
.bad { color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px }
th { text-align: left; font-weight: 500 }
th, td { padding: 4px 16px 4px 0; vertical-align: top; border-bottom: 1px solid var(--rule) }
td:last-child { padding-right: 0; overflow-wrap: anywhere }
@media (min-width: 600px) { .when { white-space: nowrap } }
.bar { background: var(--line0); height: 8px; border-radius: 4px; min-width: 2px }
pre { margin: 8px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, monospace }
summary { cursor: pointer }
"""


def page(status: RunStatus, metrics: Lines, events: Events, samples: Samples, config: str) -> str:
    """The whole page; the lines are those of metrics.jsonl, history.jsonl and samples.jsonl, `config` is TOML."""
    sections = (
        ("Curves", _curves(metrics, [_mark(event) for event in events if event["event"] in ("resume", *_BAD)])),
        ("History", _history(events)),
        ("Data", _data(status.config)),
        ("Samples", _samples(samples)),
        ("Config", f'<details class="card"><summary>config.toml</summary><pre>{escape(config)}</pre></details>'),
    )
    body = "".join(f"<h2>{name}</h2>{content}" for name, content in sections if content)
    name = escape(str(status.run_dir))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body>{_head(status, metrics, events)}{body}</body></html>\n"
    )


def _head(status: RunStatus, metrics: Lines, events: Events) -> str:
    shown = status.metrics
    starts = [event for event in events if event["event"] in ("start", "resume")]
    how = ""
    if starts:
        last = starts[-1]["details"]
        how = f"{last.get('layout', '?')} on {last.get('ranks', '?')} ranks, {last.get('precision', '?')}; "
    written = time.strftime("%d %B %Y %H:%M UTC", time.gmtime())
    state = "done" if status.done else "not done"
    tiles = [(f"of {status.steps:,} steps", f"{status.step:,}")]
    for name, label, form in (
        ("loss", "loss", "{:.4f}".format),
        ("validation_loss", "validation loss", "{:.4f}".format),
        ("tokens_seen", "tokens", format_count),
        ("tokens_per_s", "tokens/s", format_count),
        ("mfu", "MFU", "{:.1%}".format),
        ("memory_gib", "GiB, fullest rank", "{:.1f}".format),
    ):
        if name in shown:
            tiles.append((label, form(shown[name])))
    tiles.append(("trained", format_duration(_trained_s(metrics))))
    tiles.append(("resumes", str(status.restarts)))
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{label}</span></div>' for label, value in tiles)
    return (
        f"<header><h1>{escape(str(status.run_dir))}</h1>"
        f'<p class="soft">{escape(how)}{state}; written {written}</p></header><div class="tiles">{boxes}</div>'
    )


def _trained_s(metrics: Lines) -> float:
    """The time of the steps that count, without what was thrown away and waited for."""
    total = before = 0.0
    for line in metrics:
        if "step_time_s" in line:
            total += line["step_time_s"] * (line["step"] - before)
            before = line["step"]
    return total


def _curves(metrics: Lines, marks: Sequence[Mark]) -> str:
    cards = []
    for title, unit, names in _CURVES:
        found = [(label, _points(metrics, name)) for name, label in names.items()]
        curves = [(label, points) for label, points in found if points]
        if curves:
            lines = (f'<span><i class="line{i}"></i>{label}</span>' for i, (label, _) in enumerate(curves))
            key = " ".join(lines) if len(names) > 1 else ""
            drawn = chart(curves, marks, format_count)
            cards.append(f'<div class="card"><h3>{title} <span class="key">{unit} {key}</span></h3>{drawn}</div>')
    if not cards:
        return '<p class="soft">Nothing is logged yet.</p>'
    key = '<p class="soft">Over the step. Dashed lines: resumed (grey), a fault (red).</p>' if marks else ""
    return f'{key}<div class="cards">{"".join(cards)}</div>'


def _points(metrics: Lines, name: str) -> list[tuple[float, float]]:
    assert name in METRICS
    return [(line["step"], line[name]) for line in metrics if name in line and math.isfinite(line[name])]


def _mark(event: Event) -> Mark:
    return Mark(event["step"], event["event"], event["event"] in _BAD)


def _history(events: Events) -> str:
    """All but the saves that went well, which are counted."""
    rows = []
    for event in events:
        if event["event"] != "save":
            when = time.strftime("%d %b %H:%M:%S", time.gmtime(event["time"]))
            style = ' class="bad"' if event["event"] in _BAD else ""
            details = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in event["details"].items())
            what = f"<b{style}>{escape(event['event'])}</b> {escape(details)}"
            rows.append((f'<span class="soft when">{when}</span>', f"{event['step']:,}", what))
    saves = [event["step"] for event in events if event["event"] == "save"]
    counted = f"Checkpoints saved: {len(saves):,}" + (f", the last at step {saves[-1]:,}" if saves else "")
    return f"<p>{counted}</p>{_table(('UTC', 'step', 'event'), rows)}" if events else ""


def _data(config: ShownConfig) -> str:
    """The share of each source at the start, and in each later phase."""
    mixes = [("share", [source.weight for source in config.data.sources])]
    mixes += [
        (f"from sequence {phase.from_sequence:,}", phase.weights) for phase in config.data.phases if phase.weights
    ]
    rows = [
        (escape(source.corpus), *(_share(weights[i] / sum(weights)) for _, weights in mixes if i < len(weights)))
        for i, source in enumerate(config.data.sources)
    ]
    return _table(("source", *(name for name, _ in mixes)), rows) if rows else ""


def _share(share: float) -> str:
    return f'{share:.1%}<div class="bar" style="width:{100 * share:.1f}%"></div>'


def _samples(samples: Samples) -> str:
    cards = "".join(
        f'<div class="card"><span class="soft">step {line["step"]:,}</span><pre>{escape(line["sample"])}</pre></div>'
        for line in samples[-_SAMPLES:]
    )
    return f'<div class="stack">{cards}</div>' if cards else ""


def _table(names: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    """Of HTML cells."""
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll card"><table><tr>{head}</tr>{body}</table></div>'
