"""Tables of the report: the facts of a run, and the differences between several."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from triplane.config.preflight import flatten
from triplane.launcher.monitor.recorded import Recorded
from triplane.storage.errors import counted
from triplane.training.units import format_count, format_duration

_RESULTS = (
    ("loss", "loss", "{:.4f}".format),
    ("validation loss", "validation_loss", "{:.4f}".format),
    ("validation bits a byte", "validation_bits_per_byte", "{:.4f}".format),
    ("tokens seen", "tokens_seen", format_count),
    ("tokens/s", "tokens_per_s", format_count),
    ("memory, GiB", "memory_gib", "{:.1f}".format),
)


def facts(run: Recorded) -> list[tuple[str, str]]:
    """Returns what is known of a run, by name."""
    return [(name, text) for name, text in _facts(run) if text]


def _facts(run: Recorded) -> Iterator[tuple[str, str]]:
    start, table = run.start, run.table if run.config else {}
    model, training, data = (table.get(name, {}) for name in ("model", "training", "data"))
    parameters = f"{format_count(start['parameters'])} parameters" if "parameters" in start else ""
    shape = [counted(model[key], name) for key, name in (("n_layers", "layer"), ("n_heads", "head")) if key in model]
    known = (("dim", "{:,} wide"), ("vocab_size", "{:,} tokens in the vocabulary"))
    shape += [form.format(model[key]) for key, form in known if key in model]
    yield "model", "; ".join(filter(None, [parameters, ", ".join(shape)]))
    if "global_batch_size" in training and "seq_len" in data:
        sequences, length = training["global_batch_size"], data["seq_len"]
        ramp = [phase.get("global_batch_size", 0) for phase in training.get("batch_ramp", [])]
        later = "".join(f", then {size:,}" for size in ramp)
        yield "batch", f"{sequences * length:,} tokens a step: {sequences:,} sequences of {length:,}{later}"
    corpora = ", ".join(source["corpus"] for source in data.get("sources", []) if "corpus" in source)
    tokens = f"; {format_count(start['corpus_tokens'])} tokens" if "corpus_tokens" in start else ""
    yield "corpus", f"{corpora}{tokens}"
    yield "baselines", "; ".join(f"{name} = {value:.3f}" for name, value in baselines(run).items())
    yield "machine", ", ".join(filter(None, [start.get("device", ""), start.get("host", "")]))
    yield "versions", start.get("versions", "")
    yield "commit", start.get("commit", "")


def baselines(run: Recorded) -> dict[str, float]:
    """Returns losses, in nats a token, with which to compare the run's."""
    vocab_size = run.table.get("model", {}).get("vocab_size") if run.config else None
    found = {f"ln {vocab_size:,}": math.log(vocab_size)} if vocab_size else {}
    return found | ({"unigram, first 4 M tokens": run.unigram_loss} if run.unigram_loss is not None else {})


def differences(runs: Sequence[Recorded]) -> list[list[str]]:
    """Returns the results of the runs, and the settings in which they differ, a row each."""
    rows: list[list[str]] = [["state", *(run.state for run in runs)]]
    rows += [["step", *(f"{run.status.step:,} of {run.status.steps:,}" for run in runs)]]
    for label, name, form in _RESULTS:
        values = [run.last(name) for run in runs]
        if any(value is not None for value in values):
            rows.append([label, *("-" if value is None else form(value) for value in values)])
    rows.append(["trained", *(format_duration(run.trained_s()) for run in runs)])
    rows.append(["lost to faults", *(format_duration(run.lost_s()) for run in runs)])
    settings: list[dict[str, Any]] = [flatten(run.table) if run.config else {} for run in runs]
    started = ("parameters", "device", "host", "versions", "commit")
    settings = [flat | {key: run.start.get(key) for key in started} for flat, run in zip(settings, runs)]
    return rows + [[key, *(_text(flat.get(key)) for flat in settings)] for key in differing(settings)]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the keys in which settings of several runs differ, besides the run folder."""
    keys = dict.fromkeys(key for flat in settings for key in flat)
    return [key for key in keys if key != "run_dir" and len({str(flat.get(key)) for flat in settings}) > 1]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
