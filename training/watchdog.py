"""Finds a rank that hangs, says where it stands, and ends it."""

import faulthandler
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Self

from triplane.training.failure import record_failure
from triplane.training.stopwatch import Stopwatch

EXIT_CODE = os.EX_TEMPFAIL
"""Of a rank that hung: start it again."""

_PERIOD_S = 0.5
_LEAST_S = 60.0
_MEDIANS = 10.0
_REMEMBERED = 64


class Watchdog:
    """Watches from a thread how long this rank takes for a kind of work, once the first of its kind is done."""

    def __init__(self, timeout_s: float | None, run_dir: Path, rank: int, stopwatch: Stopwatch):
        self._timeout_s = timeout_s
        self._run_dir = run_dir
        self._rank = rank
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self._stopwatch = stopwatch
        self._kind, self._step = "", 0
        self._limit_s = float("inf")
        self._waited_s = 0.0
        self._closed = Event()

    def __enter__(self) -> Self:
        Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    @contextmanager
    def work(self, kind: str, step: int) -> Iterator[None]:
        """Watches the block; an error from it gets a note of where it arose."""
        seconds = self._seconds[kind]
        self._kind, self._step, self._waited_s = kind, step, 0.0
        if seconds:
            self._limit_s = self._timeout_s or max(_LEAST_S, _MEDIANS * median(seconds))
        start_s = time.monotonic()
        try:
            yield
        except Exception as error:
            error.add_note(self._where)
            raise
        finally:
            self._limit_s = float("inf")
        seconds.append(time.monotonic() - start_s)

    @property
    def _where(self) -> str:
        return f"in step {self._step}, {self._stopwatch.current.removesuffix('_time_s') or self._kind}"

    def _watch(self) -> None:
        before_s = time.monotonic()
        while not self._closed.wait(_PERIOD_S):
            now_s = time.monotonic()
            # A process that was stopped and goes on has not hung.
            self._waited_s += min(now_s - before_s, 2 * _PERIOD_S)
            before_s = now_s
            if self._waited_s > self._limit_s:
                self._end()

    def _end(self) -> None:
        message = f"no progress for {self._waited_s:.0f} s"
        print(f"hang {self._where}: {message}; where each thread stands:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        record_failure(self._run_dir, self._rank, self._where, "hang", message)
        os._exit(EXIT_CODE)
