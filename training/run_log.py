"""Reads and writes the JSON-lines logs of a run; a line truncated by a full disk or power cut spoils no other."""

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TextIO, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from triplane.training.run_folder import RunFolder

Record = TypeVar("Record")

_LAST_S = 2.0**36
"""The year 4147; later times are invalid."""


class Details(TypedDict, total=False):
    """Details of an event, with any keys; those declared here are read by other modules."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    layout: str
    ranks: int
    precision: str
    device: str
    host: str
    versions: str
    commit: str
    parameters: int
    corpus_tokens: int
    unigram_loss: float


class Event(TypedDict):
    """A record of `history.jsonl`."""

    time: Annotated[float, Field(ge=0, le=_LAST_S)]
    """Seconds since 1970."""
    event: str
    step: int
    details: Details


class Sample(TypedDict):
    """A record of `samples.jsonl`."""

    step: int
    sample: str


def _dated(values: dict[str, int | float]) -> dict[str, int | float]:
    if not isinstance(values.get("step"), int) or not 0 <= values.get("time", math.nan) <= _LAST_S:
        raise ValueError("no step or time")
    return values


Metrics = dict[str, int | float]
"""A record of `metrics.jsonl`: step, time in seconds since 1970, and values by name in `METRICS`."""

EVENTS, SAMPLES = TypeAdapter(Event), TypeAdapter(Sample)
METRICS_RECORDS: TypeAdapter[Metrics] = TypeAdapter(Annotated[Metrics, AfterValidator(_dated)])


def record_event(run_dir: Path, event: str, step: int, **details: Any) -> None:
    """Appends a record to the history; not safe for concurrent processes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open_log(RunFolder(run_dir).history) as lines:
        lines.write(json.dumps({"time": time.time(), "event": event, "step": step, "details": details}) + "\n")


def open_log(path: Path) -> TextIO:
    """Opens a log for appending, line-buffered; ends a truncated last line first."""
    log = open(path, "a+", buffering=1, encoding="utf-8")  # noqa: SIM115 - the caller closes it
    with open(path, "rb") as written:
        if written.seek(0, os.SEEK_END) and written.seek(-1, os.SEEK_END) and written.read(1) != b"\n":
            log.write("\n")
    return log


def read_log(path: Path, records: "TypeAdapter[Record]", last_bytes: int | None = None) -> list[Record]:
    """Returns the records of a log, oldest first; with `last_bytes` only those that start within them.

    A missing log has none. Skips invalid lines: an interruption truncated them, and those after them count.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        if last_bytes is not None and path.stat().st_size > last_bytes:
            file.seek(-last_bytes, os.SEEK_END)
            file.readline()  # the rest of an earlier line
        return [record for _, record in _records(file, records)]


def cut_log(path: Path, first_step: int) -> None:
    """Removes the records from `first_step` on, and broken lines, from a log of metrics or samples."""
    if not path.exists():
        return
    kept = path.with_suffix(".jsonl.partial")
    with path.open("rb") as lines, kept.open("wb") as output:
        output.writelines(line for line, record in _records(lines, _STEPS) if record["step"] < first_step)
        output.flush()
        os.fsync(output.fileno())
    os.replace(kept, path)


class _Step(TypedDict):
    step: int


_STEPS = TypeAdapter(_Step)


def _records(lines: Iterator[bytes], records: "TypeAdapter[Record]") -> Iterator[tuple[bytes, Record]]:
    for line in lines:
        if not line.endswith(b"\n"):
            return  # being written, or truncated
        try:
            yield line, records.validate_json(line)
        except ValidationError:
            continue
