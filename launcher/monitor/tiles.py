"""The figures at the head of a report."""

import math
from collections.abc import Iterator

from triplane.launcher.monitor.recorded import Recorded
from triplane.training.units import format_count, format_duration

_MOST = 12


def tiles(run: Recorded) -> list[tuple[str, str]]:
    """Returns labels and values, an even number of them, so that two columns leave none alone."""
    found = list(_tiles(run))[:_MOST]
    return found[: len(found) // 2 * 2]


def columns(count: int, most: int) -> int:
    """Returns how many of `count` tiles, an even number, stand in each row, so that all rows are full."""
    return max(n for n in range(1, most + 1) if count % n == 0)


def _tiles(run: Recorded) -> Iterator[tuple[str, str]]:
    """Yields the most important first."""
    values, status = run.status.metrics, run.status
    yield f"of {status.steps:,} steps", f"{status.step:,}"
    if "loss" in values:
        yield "loss, nats/token", f"{values['loss']:.4f}"
    validation_loss = values.get("validation_loss")
    if validation_loss is not None:
        yield "validation loss", f"{validation_loss:.4f}"
    bits = values.get("validation_bits_per_byte", values.get("bits_per_byte"))
    if bits:
        yield "bits a byte", f"{bits:.4f}"
    nats = values.get("loss") if validation_loss is None else validation_loss
    if nats is not None and nats < 700:
        yield "perplexity", _three_digits(math.exp(nats))
    if "tokens_seen" in values:
        yield "tokens seen", format_count(values["tokens_seen"])
        if corpus_tokens := run.start.get("corpus_tokens"):
            yield "epochs", f"{values['tokens_seen'] / corpus_tokens:.3g}"
    if "tokens_per_s" in values:
        yield "tokens/s", format_count(values["tokens_per_s"])
    if "mfu" in values:
        yield "MFU", f"{values['mfu']:.1%}"
    yield "trained", format_duration(run.trained_s())
    yield "lost to faults", format_duration(run.lost_s())
    if "memory_gib" in values:
        yield "memory, GiB", f"{values['memory_gib']:.1f}"
    if values.get("step_time_s") and "data_time_s" in values:
        yield "waiting for data", f"{values['data_time_s'] / values['step_time_s']:.1%}"
    yield "resumed", f"{status.restarts:,} {'time' if status.restarts == 1 else 'times'}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
