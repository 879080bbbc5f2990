"""Shows the progress of a run: one live line on a terminal, plain lines in a log file."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from triplane.training.metrics import METRICS
from triplane.training.units import format_duration

_SHOWN = ("loss", "tokens_per_s", "mfu")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Lets training continue after the reader has exited, as in `| head`."""
        with suppress(SystemExit):
            super().on_broken_pipe()  # silences this console and standard output


class Progress:
    """Progress of a run of `steps`, from the first `update` to the last; for rank 0."""

    def __init__(
        self,
        steps: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        work: Callable[[int], float] = float,
    ):
        """`work` is that of the first so many steps, in any unit; by default all have the same."""
        self._steps = steps
        self._work = work
        self._clock = clock
        self._start: tuple[int, float] | None = None
        self._console = console or _Console()
        # Refreshed explicitly: a refresh thread would compete with training.
        self._live = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            console=self._console,
            auto_refresh=False,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._live.add_task(f"step 0/{steps}", total=steps)
        self._live.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows `step`, the main metrics of `values`, and the time left."""
        parts = [f"step {step}/{self._steps}"]
        parts += [METRICS[name].format(values[name]) for name in _SHOWN if name in values]
        if left := self._time_left(step):
            parts.append(f"{left} left")
        line = "  ".join(parts)
        if self._live.disable:
            self.message(line)
        else:
            with suppress(OSError):
                self._live.update(self._task, completed=step, description=line, refresh=True)

    def message(self, text: str) -> None:
        """Prints lines that stay; a full disk or a lost terminal does not end the run."""
        with suppress(OSError):
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last line on the screen."""
        with suppress(OSError):
            self._live.stop()

    def _time_left(self, step: int) -> str | None:
        """Extrapolates from the mean speed since the first update, which excludes the slow first step."""
        now = self._clock()
        if self._start is None:
            self._start = (step, now)
        first_step, first_time = self._start
        if step == first_step:
            return None
        done, left = (self._work(b) - self._work(a) for a, b in ((first_step, step), (step, self._steps)))
        return format_duration(left * (now - first_time) / done)
