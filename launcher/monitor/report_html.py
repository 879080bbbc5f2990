"""Renders the report of one run, or of several beside each other, from the template beside this file."""

import time
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from triplane.launcher.monitor.curves import charts, style
from triplane.launcher.monitor.facts_table import differences, facts
from triplane.launcher.monitor.recorded import FAULTS, STARTS, Recorded
from triplane.launcher.monitor.run_status import ShownConfig
from triplane.launcher.monitor.tiles import columns, tiles
from triplane.training.run_log import Event

_SAMPLES = 12
"""Number of steps of which samples are shown, the latest."""
_SHOWN_ONCE = ("device", "host", "versions", "commit", "parameters", "corpus_tokens", "unigram_loss")
"""Details of a start that are among the facts."""
_TEMPLATE = "report.html.jinja"


def page(runs: Sequence[Recorded]) -> str:
    """Fills the template with the records of the runs."""
    alone = len(runs) == 1
    run = runs[0]
    loader = PackageLoader(__package__, ".")
    template = Environment(loader=loader, autoescape=True, trim_blocks=True).get_template(_TEMPLATE)
    shown_tiles = tiles(run) if alone else []
    steps = sorted({sample["step"] for run in runs for sample in run.samples})[-_SAMPLES:]
    return template.render(
        title=run.name if alone else ", ".join(run.name for run in runs),
        runs=[{"name": run.name, "style": style(i), "how": _how(run)} for i, run in enumerate(runs)],
        alone=alone,
        written=time.strftime("%d %B %Y %H:%M UTC", time.gmtime()),
        tiles=shown_tiles,
        columns=[columns(len(shown_tiles), most) for most in (2, 5, 8)],
        charts=charts(runs),
        marked=any(event["event"] == "resume" or event["event"] in FAULTS for event in run.events) and alone,
        facts=facts(run) if alone else [],
        differences=[] if alone else differences(runs),
        events=[_shown(event) for event in run.events if event["event"] != "save"] if alone else [],
        saves=[event["step"] for event in run.events if event["event"] == "save"],
        sources=_sources(run.status.config) if alone else [],
        samples=[(step, [_sample(run, step) for run in runs]) for step in steps],
        config=run.config if alone else "",
    )


def _how(run: Recorded) -> str:
    start, state = run.start, run.state
    if not start:
        return state
    layout, ranks, precision = (start.get(key, "?") for key in ("layout", "ranks", "precision"))
    return f"{layout} on {ranks} {'rank' if ranks == 1 else 'ranks'}, {precision}; {state}"


def _sample(run: Recorded, step: int) -> str:
    return next((sample["sample"] for sample in run.samples if sample["step"] == step), "")


def _shown(event: Event) -> dict[str, Any]:
    details = event["details"].items()
    kept = [(key, value) for key, value in details if event["event"] not in STARTS or key not in _SHOWN_ONCE]
    return {
        "when": time.strftime("%d %b %H:%M:%S", time.gmtime(event["time"])),
        "step": f"{event['step']:,}",
        "name": event["event"],
        "bad": event["event"] in FAULTS,
        "details": ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in kept),
    }


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _sources(config: ShownConfig) -> list[list[str]]:
    """Returns a table of the share of each source, at the start and in each later phase; of one source nothing."""
    sources = config.data.sources
    if len(sources) < 2:
        return []
    mixes = [("share", [source.weight for source in sources])]
    mixes += [
        (f"from sequence {phase.from_sequence:,}", phase.weights) for phase in config.data.phases if phase.weights
    ]
    rows = [
        [source.corpus, *(f"{weights[i] / sum(weights):.1%}" for _, weights in mixes if i < len(weights))]
        for i, source in enumerate(sources)
    ]
    return [["source", *(name for name, _ in mixes)], *rows]
