"""Finds what has changed in a run's data since a checkpoint, and whether the run may resume with it."""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from triplane.data.config import DataConfig


@dataclass(frozen=True)
class DataChange:
    """Changes, a line each."""

    refused: list[str]
    """Changes to the meaning of positions that have been read."""
    replaced: list[str]
    """Corpora whose content has changed, which the user may allow."""
    appended: list[str]
    """Sources and phases that affect only positions still to be read."""


def data_change(saved: dict[str, Any], ours: dict[str, Any], consumed_sequences: int) -> DataChange:
    """Compares the `run_record` of a checkpoint after `consumed_sequences` with that of the resuming run."""
    old, new = DataConfig.model_validate(saved["data"]), DataConfig.model_validate(ours["data"])
    refused: list[str] = []
    replaced: list[str] = []
    appended: list[str] = []
    pairs = zip_longest(old.sources, saved["corpus_digests"], new.sources, ours["corpus_digests"])
    for number, (before, old_digest, after, new_digest) in enumerate(pairs):
        if after is None:
            refused.append(
                f"data.sources[{number}] was {before.corpus} and is missing; give it weight 0 in a new phase"
            )
        elif before is None:
            appended.append(f"data.sources[{number}]: {after.corpus} ({new_digest})")
        elif old_digest != new_digest:
            replaced.append(
                f"data.sources[{number}]: the run read {before.corpus} ({old_digest}), but {after.corpus} is "
                f"{new_digest}"
            )
    for number, (then, now) in enumerate(zip_longest(_timeline(old, new), new.timeline())):
        where = f"data.phases[{number - 1}]" if number else "data.sources"
        if then == now:
            continue
        start = min(phase[0] for phase in (then, now) if phase is not None)
        if start < consumed_sequences:
            refused.append(
                f"{where}: was {_show(then)} and is {_show(now)}, but {consumed_sequences:,} sequences have been "
                f"read; append a phase from there on instead"
            )
        else:
            appended.append(f"{where}: {_show(now)}")
    return DataChange(refused, replaced, appended)


Phase = tuple[int, list[float], int]


def _timeline(old: DataConfig, new: DataConfig) -> list[Phase]:
    """Returns the phases of `old`, with weight 0 for the sources that have been appended since."""
    absent = [0.0] * (len(new.sources) - len(old.sources))
    return [(start, weights + absent, seq_len) for start, weights, seq_len in old.timeline()]


def _show(phase: Phase | None) -> str:
    if phase is None:
        return "absent"
    start, weights, seq_len = phase
    return f"weights {weights}, seq_len {seq_len} from sequence {start:,}"
