"""Detects that a rank hangs, reports where, and ends it."""

import faulthandler
import os
import socket
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from threading import Event, Thread, Timer
from typing import Self

from triplane.training.exits import Exit
from triplane.training.failure import Failure, Where
from triplane.training.stopwatch import Stopwatch

_PERIOD_S = 0.5
_LEAST_S = 60.0
_LEAST_COMPILED_S = 600.0
_MEDIANS = 10.0
_FIRST_S = 1800.0
"""Limit of the first work of a kind, which may compile or download."""
_REMEMBERED = 64
_TELLING_S = 10.0


class Watchdog:
    """Watches from a thread how long this rank takes for each kind of work.

    The limit is `timeout_s`, or by default ten times the median of earlier work of the kind, at least a minute, and
    half an hour for the first. With compiled blocks it is at least ten minutes: each new length recompiles them.
    """

    def __init__(
        self,
        timeout_s: float | None,
        *,
        rank: int,
        stopwatch: Stopwatch,
        tell: Callable[[Failure], None],
        compiled: bool = False,
    ):
        """`tell` records a hang, before the process ends."""
        self._timeout_s = timeout_s
        self._least_s = _LEAST_COMPILED_S if compiled else _LEAST_S
        self._rank = rank
        self._tell = tell
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self.stopwatch = stopwatch
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
    def work(self, kind: str, step: int, *, at_least_s: float = 0.0, usually_s: float = 0.0) -> Iterator[None]:
        """Watches the block, and adds a note of where it was raised to an error from it.

        The limit is at least `at_least_s`, whatever `timeout_s` is, and at least `usually_s` without `timeout_s`.
        """
        seconds = self._seconds[kind]
        self._kind, self._step, self._waited_s = kind, step, 0.0
        usual_s = max(self._least_s, usually_s, _MEDIANS * median(seconds)) if seconds else _FIRST_S
        self._limit_s = max(at_least_s, self._timeout_s or usual_s)
        start_s = time.monotonic()
        try:
            yield
        except Exception as error:
            error.add_note(Where(self._where))
            raise
        finally:
            self._limit_s = float("inf")
        seconds.append(time.monotonic() - start_s)

    @property
    def _where(self) -> str:
        when = f"in step {self._step}" if self._step else "before the first step"
        return f"{when}, {self.stopwatch.current.removesuffix('_time_s') or self._kind}"

    def _watch(self) -> None:
        before_s = time.monotonic()
        while not self._closed.wait(_PERIOD_S):
            now_s = time.monotonic()
            # A process that was suspended and resumed has not hung.
            self._waited_s += min(now_s - before_s, 2 * _PERIOD_S)
            before_s = now_s
            if self._waited_s > self._limit_s:
                self._end()

    def _end(self) -> None:
        # Reporting may hang for the same reason.
        Timer(_TELLING_S, os._exit, [Exit.TRY_AGAIN]).start()
        message = f"no progress for {self._waited_s:.0f} s"
        print(f"hang {self._where}: {message}; stack of each thread:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        self._tell(
            Failure(
                rank=self._rank,
                host=socket.gethostname(),
                where=self._where,
                kind="hang",
                message=message,
                time=time.time(),
            )
        )
        os._exit(Exit.TRY_AGAIN)
